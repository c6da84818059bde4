"""Checkpoints: official weights in, our own folders in and out.

A folder is recognised by its config.json and the names of its tensors, never by its own name; layouts.py knows the
names. Our own folders are those of LLaVA v1.5, with the image tower's tensors and three fields ("vision_config",
"template", "stage") added.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanollava import config as fields
from nanollava import folder as files
from nanollava import layouts
from nanollava.error import Error, first_line
from nanollava.layouts import CLIP, LLAMA, LLAVA, LLAVA_HF, Layout
from nanollava.llama import Llama
from nanollava.llava import Llava
from nanollava.tokenizer import Tokenizer, load_tokenizer
from nanollava.vit import VisionTransformer

Device = str | torch.device
Dtype = torch.dtype | None

# ---------------------------------------------------------------- loading


def load(folder: str | Path, device: Device = "cpu", dtype: Dtype = None, vision: str | Path | None = None) -> Llava:
    """A LLaVA in eval mode from an official v1.5 folder, one that transformers wrote (llava-hf), or one of our own.

    dtype: of all weights; None is bfloat16 on CUDA and float32 elsewhere.
    vision: a CLIP folder, for weights without an image tower; others refuse it. It is sought last, after the folder's
    subfolder vision_tower/ and the folder beside it that is named like the last part of `mm_vision_tower`.
    Without tokenizer.model in the folder, `model.tokenizer` is None.
    Raises Error for whatever is missing, damaged or does not fit together.
    """
    folder = files.last_good(folder)
    config, file = files.read_json(folder / "config.json"), folder / "config.json"
    fields.check_kind(config, file, "llava", "llava_llama")
    layout = LLAVA_HF if "text_config" in config else LLAVA
    if layout is LLAVA_HF:
        config = fields.from_llava_hf(config, file)
    tower = None
    if any(str(layouts.ours(name, layout)).startswith("vision.") for name in _stored(folder)):
        if vision is not None:
            raise Error(f"{folder}: has an image tower of its own; leave out {vision} (vision=, --vision)")
        sizes = fields.vision_config(fields.required(config, file, "vision_config"), file)
    else:
        tower = load_vision(_find_vision(folder, config, vision), device, dtype)
        sizes = tower.config
    settings = fields.llava_config(config, file, sizes)
    with torch.device("meta"):
        model = Llava(settings, _tokenizer(folder, settings.language.vocab_size))
    model.vision = tower or model.vision
    _fill(model, folder, layout, device, dtype)
    if model.tokenizer and model.tokenizer.vocab_size == config.get("image_token_index"):
        _cut_vocabulary(model.language, model.tokenizer.vocab_size)
    _tie(model.language)
    return model.eval()


def load_vision(folder: str | Path, device: Device = "cpu", dtype: Dtype = None) -> VisionTransformer:
    """CLIP's image tower in eval mode, from a folder of a whole CLIP or of the tower alone; dtype, Error: as `load`."""
    folder = files.last_good(folder)
    config, file = files.read_json(folder / "config.json"), folder / "config.json"
    fields.check_kind(config, file, "clip", "clip_vision_model")
    sizes = config.get("vision_config") or {} if config["model_type"] == "clip" else config
    with torch.device("meta"):
        tower = VisionTransformer(fields.vision_config(sizes, file))
    _fill(tower, folder, CLIP, device, dtype)
    return tower.eval()


def load_language(folder: str | Path, device: Device = "cpu", dtype: Dtype = None) -> Llama:
    """A LLaMA-family decoder in eval mode, from an official folder; dtype and Error as `load`. Its tokenizer:
    `load_tokenizer` on the same folder."""
    folder = files.last_good(folder)
    config, file = files.read_json(folder / "config.json"), folder / "config.json"
    fields.check_kind(config, file, "llama")
    settings = fields.language_config(config, file)
    _tokenizer(folder, settings.vocab_size)
    with torch.device("meta"):
        model = Llama(settings)
    _fill(model, folder, LLAMA, device, dtype)
    _tie(model)
    return model.eval()


def _find_vision(folder: Path, config: dict, vision: str | Path | None) -> Path:
    """The folder of the image tower, where the weights do not hold one; the order is part of `load`'s promise."""
    tower = str(config.get("mm_vision_tower") or "")
    places = [folder / "vision_tower"]
    if Path(tower).name not in ("", ".."):
        places.append(folder.resolve().parent / Path(tower).name)
    if vision is not None:
        places.append(Path(vision))
    for place in map(files.last_good, places):
        if place.is_dir():
            return place
    raise Error(
        f'{folder}: its image tower (mm_vision_tower "{tower}") is neither among its own tensors nor in '
        f"{' nor in '.join(map(str, places))}; give its folder (vision=, --vision) or fetch it: "
        f"hf download {tower or 'openai/clip-vit-large-patch14-336'} --local-dir {places[min(1, len(places) - 1)]}"
    )


def _tokenizer(folder: Path, rows: int) -> Tokenizer | None:
    """The folder's tokenizer, if it has one, found to fit an embedding of so many rows."""
    if not (folder / "tokenizer.model").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, rows)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, rows: int) -> None:
    """Raises Error where ids lack a row of the embedding, or rows an id.

    More rows than pieces are right where added_tokens.json beside the model names them, or where they pad the embedding
    to a multiple of 64.
    """
    added = tokenizer.file.parent / "added_tokens.json"
    ids = [i for i in files.read_json(added).values() if isinstance(i, int)] if added.is_file() else []
    size = max([tokenizer.vocab_size, *(i + 1 for i in ids)])
    if size != rows and not (size < rows <= size + 64 and rows % 64 == 0):
        raise Error(
            f"{tokenizer.file}: {size} tokens, but the embedding has {rows} rows (vocab_size); use the tokenizer that "
            "the weights were trained with"
        )


# ---------------------------------------------------------------- tensors into modules


def _stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder, as called there."""
    return {name: shape for file in files.weight_files(folder) for name, shape in files.shapes(file).items()}


def check_device(device: Device) -> None:
    """Raises Error where PyTorch cannot compute there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Error(f"device {device}: not to be used here ({first_line(error)}); leave it out or say cpu") from error


def _fill(module: nn.Module, folder: Path, layout: Layout, device: Device, dtype: Dtype) -> None:
    """Give every parameter that is still on the meta device its tensor from the folder; each takes its memory once."""
    check_device(device)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    if not isinstance(dtype, torch.dtype):
        raise Error(f"dtype is {dtype!r}: give one of PyTorch's, such as torch.bfloat16")
    tensors = _read(folder, _match(module, folder, layout), device, dtype)
    for head, embedding in _tied(module).items():
        if not torch.equal(tensors.setdefault(head, tensors[embedding]), tensors[embedding]):
            raise Error(f"{folder}: lm_head.weight is not the embedding; config.json must not say tie_word_embeddings")
    module.load_state_dict({**module.state_dict(), **tensors}, assign=True)


def _match(module: nn.Module, folder: Path, layout: Layout) -> dict[str, str]:
    """The files' name -> ours of each tensor that belongs to the module.

    Raises one Error with all that are missing, not expected or of another shape, before any tensor is read.
    """
    stored, tied = _stored(folder), _tied(module)
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
    if problems := [f"{files.some(tensors)} {kind}" for kind, tensors in kinds if tensors]:
        raise Error(f"{folder}: the tensors are not those that config.json promises: {'; '.join(problems)}")
    return names


def _read(folder: Path, names: dict[str, str], device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our name -> tensor, read one after the other. Raises one Error with all that hold something else than numbers."""
    tensors, bad = {}, []
    for file in files.weight_files(folder):
        for theirs, stored in files.tensors(file):
            if theirs in names:
                tensors[names[theirs]] = tensor = stored.to(device, dtype, copy=True)
                if not stored.is_floating_point() or not tensor.isfinite().all():
                    bad.append(theirs)
    if bad:
        raise Error(f"{folder}: {files.some(bad)} tensors hold NaN, infinity or integers as {dtype}; fetch them again")
    return tensors


def _cut_vocabulary(language: Llama, rows: int) -> None:
    """Drop the rows that llava-hf adds behind the tokenizer's pieces: for <image>, which needs none here, and <pad>."""
    for part in (language.embed_tokens, language.lm_head):
        part.weight = nn.Parameter(part.weight[:rows].detach().clone())
    language.embed_tokens.num_embeddings = language.lm_head.out_features = language.config.vocab_size = rows


def _tied(module: nn.Module) -> dict[str, str]:
    """The head's name -> the embedding's, where the config says that they are one matrix."""
    prefix, language = ("language.", module.language) if isinstance(module, Llava) else ("", module)
    tied = isinstance(language, Llama) and language.config.tie_word_embeddings
    return {f"{prefix}lm_head.weight": f"{prefix}embed_tokens.weight"} if tied else {}


def _tie(language: Llama) -> None:
    """Make head and embedding one parameter again, after each was assigned."""
    if language.config.tie_word_embeddings:
        language.lm_head.weight = language.embed_tokens.weight


# ---------------------------------------------------------------- saving


def save(model: Llava, folder: str | Path, dtype: Dtype = None) -> None:
    """Write a LLaVA, its image tower and its tokenizer into a folder, replacing what stands there in one step.

    dtype: what the weights are stored as; None keeps theirs. Raises Error where a weight is not finite (in that dtype),
    or the disk is full: then what stood there is intact.
    """
    with files.atomic_folder(folder) as new:
        write(model, new, dtype)


def save_vision(tower: VisionTransformer, folder: str | Path, dtype: Dtype = None) -> None:
    """Write an image tower as an official CLIP folder; otherwise like `save`."""
    with files.atomic_folder(folder) as new:
        _write_json(new / "config.json", fields.vision_fields(tower.config))
        _write_tensors(tower, new, CLIP, dtype)


def save_language(llm: Llama, tokenizer: Tokenizer | None, folder: str | Path, dtype: Dtype = None) -> None:
    """Write a decoder and its tokenizer as an official Vicuna folder; otherwise like `save`."""
    with files.atomic_folder(folder) as new:
        _write_json(new / "config.json", fields.language_fields(llm.config, dtype or llm.norm.weight.dtype))
        _write_tokenizer(tokenizer, new, llm.config.max_position_embeddings)
        _write_tensors(llm, new, LLAMA, dtype)


def write(model: Llava, folder: Path, dtype: Dtype = None) -> None:
    """The files of `save` into a folder that exists: for a block of `atomic_folder` that writes others beside them."""
    _write_json(folder / "config.json", fields.llava_fields(model.config, dtype or model.language.norm.weight.dtype))
    _write_tokenizer(model.tokenizer, folder, model.config.max_length)
    _write_tensors(model, folder, LLAVA, dtype)


def _write_tensors(module: nn.Module, folder: Path, layout: Layout, dtype: Dtype) -> None:
    tied, tensors = _tied(module), {}
    for name, tensor in module.state_dict().items():
        if name in tied:
            continue
        tensors[layouts.theirs(name, layout)] = stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not stored.isfinite().all():
            raise Error(f"{name} holds NaN or infinity as {stored.dtype}; go back to an earlier checkpoint")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path, max_length: int) -> None:
    """tokenizer.model, and the settings that decide its spacing."""
    if tokenizer is None:
        return
    shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
    if (added := tokenizer.file.with_name("added_tokens.json")).is_file():  # rows of the embedding that need a name
        shutil.copyfile(added, folder / added.name)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    flags = {"legacy": tokenizer.legacy, "add_bos_token": True, "add_eos_token": False, "model_max_length": max_length}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **special, **flags})


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from nanollava.convert import main  # it builds on this module

    raise SystemExit(main())
