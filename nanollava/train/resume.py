"""A run folder at every moment: a checkpoint that can be loaded and talked to, and, until the run is over, all that
--resume needs to go on as if nothing had happened.

    OUT/                          the newest checkpoint
    OUT/metrics.jsonl             a line for every step
    OUT/training.pt               optimizer states, step, what the run was begun with; gone when the run is over
    OUT/checkpoints/step-000500/  older ones (--keep)

No random state is saved, for there is none: whatever is drawn in step t is a function of the seed and of t.
"""

import json
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanollava.checkpoint import load, write
from nanollava.error import Error, first_line, out_of_memory
from nanollava.folder import atomic_folder, check_writable, last_good, read_json
from nanollava.llava import Llava
from nanollava.train import lora
from nanollava.train.distributed import gathered, processes, rank, share_of, share_of_states, whole
from nanollava.train.keep import keep_older
from nanollava.train.records import image_path

if TYPE_CHECKING:
    from nanollava.train.data import Dataset
    from nanollava.train.loop import Run

GIVEN = {  # by the user: what each part of the fingerprint comes from
    "stage": "stage",
    "config": "model, --max-length and --image-aspect-ratio",
    "data": "--data, --share-images and --val-fraction",
    "images": "--images",
    "options": "options",
    "base": "--model or --language",
}
# options that may change on --resume, as those that end in _every
UNSHAPING = ("compile", "recompute", "rows_at_once", "parallel", "keep", "base")


def progress(out: Path) -> str:
    """Of a run in ``out``: "none" was saved, it was "begun", or it is "finished"."""
    folder = last_good(out)
    if not (folder / "config.json").is_file():
        return "none"
    return "begun" if (folder / "training.pt").is_file() else "finished"


def check_out(out: Path, resume: bool) -> None:
    """Raises Error where a new run cannot begin in ``out``, or where there is none to resume. Changes nothing in it."""
    folder, done = last_good(out), progress(out)
    if resume and done == "finished":
        stage = read_json(folder / "config.json").get("stage") or "a model"
        raise Error(f"{out}: nothing to resume: it holds {stage}, finished; choose another --out for a new run")
    if resume and done == "none":
        raise Error(f"{out}: nothing to resume: no checkpoint was saved there; start without --resume")
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Error(f"{out} exists: {'go on with --resume, or ' if done == 'begun' else ''}choose another --out")
    check_writable(out)


def save(run: "Run", final: bool = False) -> None:
    """The model, the metrics, and, unless the run is over, all that --resume needs: written by the first process, to
    whom all others give their shares."""
    with nullcontext() if rank() else atomic_folder(run.out) as folder:
        write_weights(run, folder, final)
        if folder:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in run.metrics))
            if run.saved:
                keep_older(run.out, folder, run.saved, run.options.keep - 1)
        if not final:
            state = {"optimizers": [gathered(o.state_dict()) for o in run.optimizers], "step": run.step}
            if folder:
                torch.save(state | fingerprint(run), folder / "training.pt")
    run.saved = run.step


def write_weights(run: "Run", folder: Path | None, final: bool) -> None:
    """The model, or while there are adapters what was trained; they are merged at the end."""
    adapted = run.options.lora
    if adapted and not final:
        trained = gathered(lora.trained(run.model))
        if folder:
            lora.write_trained(run.model, trained, folder, run.options)
        return
    model = whole(run.model, blank(run)) if processes() > 1 else run.model
    if folder and adapted:
        lora.merge(model)
    if folder:
        write(model, folder)


def blank(run: "Run") -> Llava:
    """A model like the run's, its tensors without numbers."""
    with torch.device("meta"):
        model = Llava(run.model.config, run.model.tokenizer)
    if run.options.lora:
        lora.adapt(model, run.options.lora, run.options.lora_alpha, run.options.lora_dropout)
    return model


def fingerprint(run: "Run") -> dict:
    """What must be the same for a resumed run to give the losses of an undisturbed one, but for rounding: compiling,
    recomputing and how many rows are computed at once, or side by side, may move the last bits, like the machine; and
    what adapters' dropout draws."""
    shaping = {k: v for k, v in asdict(run.options).items() if not k.endswith("_every") and k not in UNSHAPING}
    return {
        "stage": run.stage.name,
        "config": asdict(run.model.config),
        "data": f"{len(run.data):,} groups of records (checksum {run.data.checksum:08x})",
        "images": f"files (sizes of the first: checksum {run.image_sizes:08x})",
        "options": shaping,
        **({"base": run.base} if run.base else {}),
    }


def image_sizes(data: "Dataset", count: int = 100) -> int:
    """A number that tells another folder of images from this one: by the sizes of the first ``count`` files."""
    value = 0
    names = dict.fromkeys(name for examples in data.groups for example in examples for name in example.images)
    for name in list(names)[:count]:
        file = image_path(data.folder, name)
        value = zlib.crc32(str(file.stat().st_size if file.exists() else None).encode(), value)
    return value


def restore(run: "Run") -> None:
    """Load weights, optimizer and place in the data from ``out``."""
    folder = last_good(run.out)
    state = read_state(folder / "training.pt")
    for name, value in fingerprint(run).items():
        if state.get(name) != value:
            what = f"different {name}: {differences(state.get(name), value)}"
            raise Error(f"{run.out}: the run there began with {what}; give the same {GIVEN[name]}, or another --out")
    try:
        restore_weights(run.model, folder, bool(run.options.lora))
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(share_of_states(saved, optimizer))
        run.step = run.saved = range(run.options.steps)[state["step"]]
    except (Error, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Error(f"{folder}: damaged ({first_line(error).partition('; ')[0]}); {way_out(folder)}") from error
    run.metrics = read_metrics(folder / "metrics.jsonl", run.step)
    print(f"resuming at step {run.step} of {run.options.steps}", flush=True)


def restore_weights(model: Llava, folder: Path, adapted: bool) -> None:
    if adapted:
        return lora.read_trained(model, folder)
    weights = load(folder, dtype=torch.float32).state_dict()
    model.load_state_dict({name: share_of(weights[name], x) for name, x in model.state_dict().items()})


def read_metrics(file: Path, step: int) -> list[dict]:
    """The entries of the steps up to that one, or, where somebody deleted the file, of those since. Raises Error where
    it holds something else."""
    if not file.exists():
        return []
    try:
        entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = [entry["step"] for entry in entries]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        found = []
    if not found or found != list(range(step - len(found) + 1, step + 1)):
        raise Error(f"{file}: not a line for every step up to {step}; delete it to go on without the log")
    return entries


def way_out(folder: Path) -> str:
    """What to do where the newest checkpoint of a run is damaged."""
    older = sorted(folder.glob("checkpoints/step-*[0-9]/training.pt"), key=lambda file: (len(str(file)), file))
    back = f"copy {older[-1].parent} and give the copy as --out, or " if older else ""
    return f"{back}choose another --out and start again"


def read_state(file: Path) -> dict:
    """What ``save`` left for --resume. Raises Error where it is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch.load looks at no checksum
                raise ValueError(damaged)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=processes() > 1)  # all read the same
        return {"optimizers": [], "step": 0, **state}
    except Exception as error:  # a damaged pickle can fail in any way, and torch's words advise to load it unsafely
        if out_of_memory(error):
            raise
        raise Error(f"{file}: damaged or not to be read ({type(error).__name__}); {way_out(file.parent)}") from error


def differences(old: object, new: object) -> str:
    """The fields of two dictionaries that differ, or the two values."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{old}, not {new}"
    pairs = {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}
    deep = {name for name, pair in pairs.items() if all(isinstance(value, dict) for value in pair)}
    return ", ".join(
        f"{name}: {differences(*pair)}" if name in deep else f"{name} was {pair[0]}, now {pair[1]}"
        for name, pair in pairs.items()
    )
