"""Tensors of files into modules and back: every one accounted for, each taking its memory once.

What they are called in which kind of folder stands in layouts.py, where the files are in folder.py.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanollava import folder as files
from nanollava import layouts
from nanollava.error import Error, first_line, some
from nanollava.layouts import Layout
from nanollava.llama import Llama
from nanollava.llava import Llava

Device = str | torch.device
Dtype = torch.dtype | None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder or a file, as called there. Raises Error for one in two shards."""
    stored, twice = {}, []
    for file in files.weight_files(folder):
        shapes = files.shapes(file)
        twice += shapes.keys() & stored.keys()
        stored |= shapes
    if twice:
        raise Error(f"{folder}: {some(sorted(twice))} tensors are in two files each; download it again")
    return stored


def check_device(device: Device) -> None:
    """Raises Error where PyTorch cannot compute there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Error(f"device {device}: not to be used here ({first_line(error)}); leave it out or say cpu") from error


def check_dtype(dtype: object, device: Device = "cpu") -> None:
    """Raises Error for what weights cannot be: no floats, floats of a single byte, or such as the device lacks."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise Error(f"dtype is {dtype!r}: give one of PyTorch's, such as torch.bfloat16")
    try:
        one = torch.ones(1, 1, device=device, dtype=dtype)
        (one @ one).item()
    except (RuntimeError, TypeError) as error:
        name = str(dtype).removeprefix("torch.")
        raise Error(f"dtype {name}: device {device} lacks it ({first_line(error)}); choose another --dtype") from error


def fill(module: nn.Module, folder: Path, layout: Layout, device: Device, dtype: Dtype) -> None:
    """Give every parameter that is still on the meta device its tensor from the folder, or the one file, on ``device``.

    dtype: what they become; None is bfloat16 on CUDA and float32 elsewhere. What needs no conversion stays in the
    file's pages, shared with whoever else reads it; what is written there is the model's own. On the device "meta"
    names and shapes are checked and nothing is read. Raises Error for a device or a dtype that cannot be, for tensors
    missing, not expected or of another shape, and for such as hold no numbers.
    """
    if str(device) == "meta":
        match_names(module, folder, layout)
        return
    check_device(device)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    check_dtype(dtype, device)
    tensors = _read(folder, match_names(module, folder, layout), device, dtype)
    for head, embedding in _tied(module).items():
        if not torch.equal(tensors.setdefault(head, tensors[embedding]), tensors[embedding]):
            raise Error(f"{folder}: lm_head.weight is not the embedding; config.json must not say tie_word_embeddings")
    module.load_state_dict({**module.state_dict(), **tensors}, assign=True)


def match_names(module: nn.Module, folder: Path, layout: Layout) -> dict[str, str]:
    """The files' name -> ours of each tensor that belongs to the module.

    Raises one Error with all that are missing, not expected or of another shape, before any tensor is read.
    """
    stored, tied = stored_shapes(folder), _tied(module)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_meta}
    names = {theirs: ours for theirs in stored if (ours := layouts.ours(theirs, layout)) is not None}
    last = {ours: theirs for theirs, ours in names.items()}  # one tensor under two names is one too many
    missing = [layouts.theirs(name, layout) for name in wanted if name not in last and name not in tied]
    extra = [theirs for theirs, ours in names.items() if ours not in wanted or last[ours] != theirs]
    misshapen = [
        f"{theirs} is {stored[theirs]} for {wanted[ours]}"
        for theirs, ours in names.items()
        if ours in wanted and stored[theirs] != wanted[ours]
    ]
    kinds = (("missing", missing), ("not expected", extra), ("of another shape", misshapen))
    if problems := [f"{some(tensors)} {kind}" for kind, tensors in kinds if tensors]:
        raise Error(f"{folder}: the tensors are not those that config.json promises: {'; '.join(problems)}")
    return names


def _read(folder: Path, names: dict[str, str], device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our name -> tensor, read one after the other. Raises one Error with all that hold something else than numbers."""
    tensors, bad = {}, []
    for file in files.weight_files(folder):
        for theirs, stored in files.tensors(file):
            if theirs in names:
                if not stored.is_floating_point():
                    bad.append(theirs)
                    continue
                tensors[names[theirs]] = tensor = stored.to(device, dtype)
                if not finite(tensor):
                    bad.append(theirs)
    if bad:
        raise Error(f"{folder}: {some(bad)} tensors hold NaN, infinity or integers as {dtype}; fetch them again")
    return tensors


def own(module: nn.Module) -> nn.Module:
    """The module with copies of what may stand in mapped pages: who writes to a file changes them, and who cuts it ends
    the process that reads them, even those that it has written to."""
    for p in module.parameters():
        if p.device.type == "cpu":
            p.data = p.data.clone()
    return module


def finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it: both show in the extremes. Tensor.isfinite takes about ten times
    as long for bfloat16 on a CPU, and memory."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def usable(tensor: Tensor) -> bool:
    """Whether it can be computed with as it is: floats of at least two bytes, all finite."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and finite(tensor)


def cut_vocabulary(language: Llama, rows: int) -> None:
    """Drop the rows that llava-hf adds behind the tokenizer's pieces: for <image>, which needs none here, and <pad>.
    Raises Error where there are not so many."""
    if rows > language.config.vocab_size:
        raise Error(f"rows_before_image is {rows}, but the vocabulary has {language.config.vocab_size} (vocab_size)")
    for part in (language.embed_tokens, language.lm_head):
        part.weight = nn.Parameter(part.weight[:rows].detach().clone())
    language.embed_tokens.num_embeddings = language.lm_head.out_features = language.config.vocab_size = rows


def add_vocabulary(language: Llama, rows: Tensor, size: int) -> None:
    """Widen the vocabulary to ``size``: the last rows of the embedding are ``rows``, other new ones the mean of the
    old, as the official code starts them. Raises Error where ``rows`` are not as wide or not finite."""
    V, D = language.config.vocab_size, language.config.hidden_size
    if rows.shape != (2, D) or not usable(rows):
        raise Error(f"the embedding of <im_start> and <im_end> must be 2 rows of {D} finite numbers; fetch it again")
    for part, last in ((language.lm_head, rows[:0]), (language.embed_tokens, rows)):
        old = part.weight.detach()
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype).expand(size - V - len(last), -1)
        part.weight = nn.Parameter(torch.cat([old, mean, last.to(old)]))
    language.embed_tokens.num_embeddings = language.lm_head.out_features = language.config.vocab_size = size


def _tied(module: nn.Module) -> dict[str, str]:
    """The head's name -> the embedding's, where the config says that they are one matrix."""
    prefix, language = ("language.", module.language) if isinstance(module, Llava) else ("", module)
    tied = isinstance(language, Llama) and language.config.tie_word_embeddings
    return {f"{prefix}lm_head.weight": f"{prefix}embed_tokens.weight"} if tied else {}


def tie(language: Llama) -> None:
    """Make head and embedding one parameter again, after each was assigned."""
    if language.config.tie_word_embeddings:
        language.lm_head.weight = language.embed_tokens.weight


def write_tensors(module: nn.Module, folder: Path, layout: Layout, dtype: Dtype) -> None:
    """A module's tensors as the one file of a folder. Raises Error where one is not finite (in that dtype)."""
    tied = _tied(module)
    write_named({name: t for name, t in module.state_dict().items() if name not in tied}, folder, layout, dtype)


def write_named(tensors: dict[str, Tensor], folder: Path, layout: Layout, dtype: Dtype) -> None:
    """The same for tensors by the names that they have here."""
    if dtype is not None:
        check_dtype(dtype)
    named = {}
    for name, tensor in tensors.items():
        named[layouts.theirs(name, layout)] = stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not finite(stored):
            raise Error(f"{name} holds NaN or infinity as {stored.dtype}; go back to an earlier checkpoint")
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
