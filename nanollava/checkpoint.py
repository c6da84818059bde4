"""Checkpoints: official weights in, our own folders in and out.

A folder is recognised by its config.json and the names of its tensors, never by its own name; layouts.py knows the
names. Our own folders are those of LLaVA v1.5, with the image tower's tensors and three fields ("vision_config",
"template", "stage") added.
"""

import shutil
from pathlib import Path

import torch

from nanollava import config as fields
from nanollava import folder as files
from nanollava import layouts, lora
from nanollava.error import Error
from nanollava.layouts import CLIP, LLAMA, LLAVA, LLAVA_HF, PROJECTOR
from nanollava.llama import Llama
from nanollava.llava import Llava
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer, added_tokens, load_tokenizer
from nanollava.vit import VisionConfig, VisionTransformer
from nanollava.weights import Device, Dtype, cut_vocabulary, fill, stored_shapes, tie, write_tensors

# ---------------------------------------------------------------- loading


def load(
    folder: str | Path,
    device: Device = "cpu",
    dtype: Dtype = None,
    vision: str | Path | None = None,
    base: str | Path | None = None,
) -> Llava:
    """A LLaVA in eval mode: an official folder (v0 to v1.5), one that transformers wrote (llava-hf), one of our own, or
    what an official run trained over a base: a LoRA, or stage 1's mm_projector.bin.

    dtype: of all weights; None is bfloat16 on CUDA and float32 elsewhere.
    vision: a CLIP folder, for weights without an image tower; others refuse it. It is sought last, after the folder's
    subfolder vision_tower/ and the folder beside it that is named like the last part of `mm_vision_tower`.
    base: the folder of the language model that was trained over; None is the one beside the folder that is named like
    the last part of the base's name. Whole models refuse it.
    Without tokenizer.model in the folder, `model.tokenizer` is None.
    Raises Error for whatever is missing, damaged or does not fit together.
    """
    folder = files.last_good(folder)
    config, file = files.read_json(folder / "config.json"), folder / "config.json"
    fields.check_kind(config, file, "llava", "llava_llama")
    layout = LLAVA_HF if "text_config" in config else LLAVA
    if layout is LLAVA_HF:
        config = fields.from_llava_hf(config, file)
    weights, tower = language_folder(folder, base), None
    own = any(str(layouts.ours(name, layout)).startswith("vision.") for name in stored_shapes(weights))
    if own and config.get("vision_config") is not None:
        if vision is not None:
            raise Error(f"{folder}: has an image tower of its own; leave out {vision} (vision=, --vision)")
        sizes = fields.vision_config(config["vision_config"], file)
    elif own:  # a fork's: the tensors are here, their sizes in the official tower's folder
        sizes = _vision_sizes(_find_vision(folder, config, vision, "the config of its image tower"))
    else:
        tower = load_vision(_find_vision(folder, config, vision, "its image tower"), device, dtype)
        sizes = tower.config
    settings = fields.llava_config(config, file, sizes)
    with torch.device("meta"):
        model = Llava(settings, _tokenizer(weights, settings.language.vocab_size))
    model.vision = tower or model.vision
    if weights == folder:
        fill(model, folder, layout, device, dtype)
    else:
        _fill_over_base(model, folder, weights, device, dtype)
    _cut_vocabulary(model, config)
    if settings.use_im_start_end and model.tokenizer:
        _name_image_marks(model, folder, "template" in config)
    tie(model.language)
    return model.eval()


def load_vision(folder: str | Path, device: Device = "cpu", dtype: Dtype = None) -> VisionTransformer:
    """CLIP's image tower in eval mode, from a folder of a whole CLIP or of the tower alone; dtype, Error: as `load`."""
    folder = files.last_good(folder)
    with torch.device("meta"):
        tower = VisionTransformer(_vision_sizes(folder))
    fill(tower, folder, CLIP, device, dtype)
    return tower.eval()


def _vision_sizes(folder: Path) -> VisionConfig:
    """The sizes of the tower in a folder of a whole CLIP or of the tower alone."""
    config, file = files.read_json(folder / "config.json"), folder / "config.json"
    fields.check_kind(config, file, "clip", "clip_vision_model")
    return fields.vision_config(config.get("vision_config") or {} if config["model_type"] == "clip" else config, file)


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
    fill(model, folder, LLAMA, device, dtype)
    tie(model)
    return model.eval()


def language_folder(folder: Path, base: str | Path | None = None) -> Path:
    """Where the language model's weights are: in the folder itself, or, where it holds no more than was trained, in its
    base. Raises Error where that is not found, and for a base that nobody asked for."""
    adapter = folder / "adapter_config.json"
    whole = any(folder.glob("pytorch_model*")) or any(folder.glob("model*.safetensors*"))
    if whole or not (adapter.is_file() or (folder / "mm_projector.bin").is_file()):
        if base is not None:
            raise Error(f"{folder}: holds a whole model; leave out {base} (base=, --base)")
        return folder
    if adapter.is_file():
        name = files.read_json(adapter).get("base_model_name_or_path") or "lmsys/vicuna-7b-v1.5"
    else:
        name = files.read_json(folder / "config.json").get("_name_or_path") or "lmsys/vicuna-7b-v1.5"
    beside = _beside(folder, name)
    place = files.last_good(base or beside or folder)
    if not place.is_dir() or place.resolve() == folder.resolve():
        fetch = f" or fetch it: hf download {name} --local-dir {beside}" if beside else ""
        raise Error(
            f'{folder}: was trained over a base, "{name}", not in {place}; give its folder (base=, --base){fetch}'
        )
    return place


def _beside(folder: Path, name: object) -> Path | None:
    """The folder next to this one that is called like the last part of a repository's name, wherever that was."""
    last = Path(name).name if isinstance(name, str) and name.isprintable() else ""
    return folder.resolve().parent / last if last not in ("", "..") else None


def _fill_over_base(model: Llava, folder: Path, base: Path, device: Device, dtype: Dtype) -> None:
    """The base as language model, the projector that was trained with it, and what LoRA adds to it."""
    adapted, sizes = (folder / "adapter_config.json").is_file(), model.config.language
    projector = folder / ("non_lora_trainables.bin" if adapted else "mm_projector.bin")
    if not projector.is_file():
        raise Error(f"{projector}: no such file; a LoRA run keeps its projector there, is the download complete?")
    config, file = files.read_json(base / "config.json"), base / "config.json"
    fields.check_kind(config, file, "llama")
    known = fields.language_config(config, file)
    for name, here in vars(sizes).items():  # said before gigabytes are read
        if (there := getattr(known, name)) != here and name != "max_position_embeddings":
            raise Error(f"{base}: {name} is {there}, but {folder} was trained over one with {here}; give its base")
    fill(model.projector, projector, PROJECTOR, device, dtype)
    model.language = load_language(base, device, dtype)
    model.config.language = model.language.config
    if adapted:
        lora.merge(model.language, folder)
    else:
        model.config.stage, model.config.template = "stage1", "plain"


def _cut_vocabulary(model: Llava, config: dict) -> None:
    """Drop the rows that llava-hf has for <image> and what comes behind: our own export tells how many there were
    before; in others' folders <image> comes right behind the tokenizer's pieces."""
    rows = config.get("rows_before_image")
    if rows is None and model.tokenizer and model.tokenizer.vocab_size == config.get("image_token_index"):
        rows = model.tokenizer.vocab_size
    if rows is not None:
        cut_vocabulary(model.language, rows)


def _name_image_marks(model: Llava, folder: Path, template_known: bool) -> None:
    """Let an image stand between <im_start> and <im_end>, as v0 and v1 were trained. Their configs name no template: v0
    is known by its padding token."""
    added = added_tokens(folder)
    if missing := [t for t in ("<im_start>", "<im_end>") if added.get(t, 0) < model.tokenizer.vocab_size]:
        asked = f"{' and '.join(missing)} missing, which config.json asks for (mm_use_im_start_end)"
        raise Error(f"{folder / 'added_tokens.json'}: {asked}; fetch the file again")
    model.tokenizer.image_ids = [added["<im_start>"], IMAGE_TOKEN_ID, added["<im_end>"]]
    if not template_known:
        model.config.template = "llava_v0" if "[PAD]" in added else "llava_v1"


def _find_vision(folder: Path, config: dict, vision: str | Path | None, what: str) -> Path:
    """The folder of the image tower, where the weights do not hold one; the order is part of `load`'s promise."""
    tower = config.get("mm_vision_tower") or ""
    places = [folder / "vision_tower", *filter(None, [_beside(folder, tower)])]
    if vision is not None:
        places.append(Path(vision))
    for place in map(files.last_good, places):
        if place.is_dir():
            return place
    fetch = f"hf download {tower or 'openai/clip-vit-large-patch14-336'} config.json pytorch_model.bin"
    raise Error(
        f'{folder}: {what} (mm_vision_tower "{tower}") is neither in the folder itself nor in '
        f"{' nor in '.join(map(str, places))}; give its folder (vision=, --vision) or fetch it: "
        f"{fetch} --local-dir {places[min(1, len(places) - 1)]}"
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
    size = max([tokenizer.vocab_size, *(i + 1 for i in added_tokens(tokenizer.file.parent).values())])
    if size != rows and not (size < rows <= size + 64 and rows % 64 == 0):
        raise Error(
            f"{tokenizer.file}: {size} tokens, but the embedding has {rows} rows (vocab_size); use the tokenizer that "
            "the weights were trained with"
        )


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
        files.write_json(new / "config.json", fields.vision_fields(tower.config))
        write_tensors(tower, new, CLIP, dtype)


def save_language(llm: Llama, tokenizer: Tokenizer | None, folder: str | Path, dtype: Dtype = None) -> None:
    """Write a decoder and its tokenizer as an official Vicuna folder; otherwise like `save`."""
    with files.atomic_folder(folder) as new:
        files.write_json(new / "config.json", fields.language_fields(llm.config, dtype or llm.norm.weight.dtype))
        _write_tokenizer(tokenizer, new, llm.config.max_position_embeddings, llm.config.vocab_size)
        write_tensors(llm, new, LLAMA, dtype)


def write(model: Llava, folder: Path, dtype: Dtype = None) -> None:
    """The files of `save` into a folder that exists: for a block of `atomic_folder` that writes others beside them."""
    write_settings(model, folder, dtype or model.language.norm.weight.dtype)
    write_tensors(model, folder, LLAVA, dtype)


def write_settings(model: Llava, folder: Path, dtype: torch.dtype) -> None:
    """Config and tokenizer beside weights of that dtype."""
    files.write_json(folder / "config.json", fields.llava_fields(model.config, dtype))
    _write_tokenizer(model.tokenizer, folder, model.config.max_length, model.config.language.vocab_size)


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path, max_length: int, rows: int) -> None:
    """tokenizer.model, and the settings that decide its spacing."""
    if tokenizer is None:
        return
    shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
    # rows of the embedding that need a name; those of llava-hf for <image> and <pad> were cut off
    if added := {token: i for token, i in added_tokens(tokenizer.file.parent).items() if i < rows}:
        files.write_json(folder / "added_tokens.json", added)
    files.write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, max_length))


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict:
    """tokenizer_config.json, as LlamaTokenizer writes it."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    flags = {"legacy": tokenizer.legacy, "add_bos_token": True, "add_eos_token": False, "model_max_length": max_length}
    return {"tokenizer_class": "LlamaTokenizer", **special, **flags}


if __name__ == "__main__":
    from nanollava.convert import main  # it builds on this module

    raise SystemExit(main())
