"""Checkpoints: official weights in, our own folders in and out.

A folder is recognised by its config.json and the names of its tensors, never by its own name; layouts.py knows the
names. Our own folders are those of LLaVA v1.5, with the image tower's tensors and three fields ("vision_config",
"template", "stage") added.

    official v1.5       LLaMA and projector; the tower in CLIP's folder       LLAVA
    official v0, v1     the same, one linear layer, tokens around an image    LLAVA
    llava-hf            everything, by transformers' names                    LLAVA_HF
    LoRA run            adapters and projector, over a base (lora.py)         PROJECTOR
    stage 1             mm_projector.bin, over a base                         PROJECTOR
    CLIP, Vicuna        load_vision, load_language                            CLIP, LLAMA
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from nanollava import config as fields
from nanollava import folder as files
from nanollava import layouts, lora
from nanollava.error import Error
from nanollava.layouts import CLIP, LLAMA, LLAVA, LLAVA_HF
from nanollava.llama import Llama
from nanollava.llava import Llava
from nanollava.places import check_no_adapters, find_vision, language_folder
from nanollava.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from nanollava.trained import Trained, check_base, read_trained, same_tower
from nanollava.vit import VisionConfig, VisionTransformer
from nanollava.weights import Device, Dtype, add_vocabulary, cut_vocabulary, fill, stored_shapes, tie, write_tensors

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

    device: "meta" gives the sizes and the tokenizer: names and shapes of the weights are checked, none is read.
    dtype: of all weights; None is bfloat16 on CUDA and float32 elsewhere.
    vision: a CLIP folder, for weights without an image tower; others refuse it. None: the folder's subfolder
    vision_tower/, or the folder beside it that is named like the last part of `mm_vision_tower`.
    base: the folder of the model that was trained over; None is the one beside the folder that is named like the last
    part of the base's name. Whole models refuse it.
    Without tokenizer.model in the folder, or in its base, `model.tokenizer` is None.
    Raises Error for whatever is missing, damaged or does not fit together.
    """
    folder = files.last_good(folder)
    config, file = files.read_json(folder / "config.json"), folder / "config.json"
    fields.check_kind(config, file, "llava", "llava_llama")
    weights = language_folder(folder, base)
    if weights == folder:
        model = _load_whole(folder, config, vision, device, dtype)
    else:
        model = _load_over_base(read_trained(folder, config), weights, vision, device, dtype)
    tie(model.language)
    return model.eval()


def _load_whole(folder: Path, config: dict, vision: str | Path | None, device: Device, dtype: Dtype) -> Llava:
    """A folder with all weights in it, but perhaps those of the image tower."""
    file, layout, tower = folder / "config.json", LLAVA, None
    if "text_config" in config:
        config, layout = fields.from_llava_hf(config, file), LLAVA_HF
        if config.get("image_aspect_ratio") is None and (folder / "preprocessor_config.json").is_file():
            pads = files.read_json(folder / "preprocessor_config.json").get("do_pad")
            config["image_aspect_ratio"] = "pad" if pads else "crop"
    own = _has_tower(folder, layout)
    if own and config.get("vision_config") is not None:
        if vision is not None:
            raise Error(f"{folder}: has an image tower of its own; leave out {vision} (vision=, --vision)")
        sizes = fields.vision_config(config["vision_config"], file)
    elif own:  # a fork's: the tensors are here, their sizes in the official tower's folder
        sizes = _vision_sizes(find_vision(folder, config, vision, "the config of its image tower"))
    else:
        tower = load_vision(find_vision(folder, config, vision, "its image tower"), device, dtype)
        sizes = tower.config
    settings = fields.llava_config(config, file, sizes)
    with torch.device("meta"):
        model = Llava(settings, _tokenizer(folder, settings.language.vocab_size))
    model.vision = tower or model.vision
    fill(model, folder, layout, device, dtype)
    if layout is LLAVA_HF:
        _cut_vocabulary(model, config)
    _settle_template(model, config)
    return model


def _has_tower(folder: Path, layout: layouts.Layout) -> bool:
    return any(str(layouts.ours(name, layout)).startswith("vision.") for name in stored_shapes(folder))


def _settle_template(model: Llava, config: dict) -> None:
    """v0 and v1 name no template: they are known by the tokens around images, v0 by its padding token besides."""
    if model.config.use_im_start_end and model.tokenizer and config.get("template") is None:
        model.config.template = "llava_v0" if "[PAD]" in model.tokenizer.added else "llava_v1"


def _load_over_base(trained: Trained, base: Path, vision: str | Path | None, device: Device, dtype: Dtype) -> Llava:
    """A base, a Vicuna or a LLaVA, with the projector that was trained over it and what LoRA adds to it."""
    config, file = files.read_json(base / "config.json"), base / "config.json"
    fields.check_kind(config, file, "llama", "llava", "llava_llama")
    whole = None if config["model_type"] == "llama" else _load_base(base, config, vision, device, dtype)
    known = whole.config.language if whole else fields.language_config(config, file)
    check_base(trained, base, known)  # said before a Vicuna's gigabytes are read
    if whole and vision is None and same_tower(trained.config, config):
        tower = whole.vision
    else:
        tower = load_vision(find_vision(trained.folder, trained.config, vision, "its image tower"), device, dtype)
    with torch.device("meta"):
        model = Llava(fields.llava_config(trained.config, trained.folder / "config.json", tower.config))
    fill(model.projector, trained.projector, trained.layout, device, dtype)
    model.vision, model.language = tower, whole.language if whole else load_language(base, device, dtype)
    model.config.language = model.language.config
    model.tokenizer = _tokenizer(trained.folder, trained.language.vocab_size)
    if model.tokenizer is None:
        model.tokenizer = whole.tokenizer if whole else _tokenizer(base, known.vocab_size)
    _add_trained(model, trained, device)
    return model


def _add_trained(model: Llava, trained: Trained, device: Device) -> None:
    """What was trained besides the projector, and what that tells of the template."""
    _learn_start_end(model, trained.start_end, trained.language.vocab_size)
    if trained.adapted:
        if str(device) != "meta":
            lora.merge_folder(model.language, trained.folder)
        _settle_template(model, trained.config)
    else:
        model.config.stage, model.config.template = "stage1", trained.config.get("template") or "plain"


def _load_base(base: Path, config: dict, vision: str | Path | None, device: Device, dtype: Dtype) -> Llava:
    """A LLaVA as a base: a tower that was given is for it only where it holds none."""
    holds = language_folder(base) == base and _has_tower(base, LLAVA_HF if "text_config" in config else LLAVA)
    return load(base, device, dtype, None if holds else vision)


def _learn_start_end(model: Llava, start_end: Tensor | None, size: int) -> None:
    """Give <im_start> and <im_end> the last two rows of a vocabulary of that size, where a file has them, and let them
    stand around images where the config says so."""
    if start_end is not None:
        add_vocabulary(model.language, start_end, size)
    if model.config.use_im_start_end and model.tokenizer:
        if start_end is not None:
            model.tokenizer.added |= {"<im_start>": size - 2, "<im_end>": size - 1}
        model.tokenizer.enclose_images()


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
    check_no_adapters(folder)
    settings = fields.language_config(config, file)
    _tokenizer(folder, settings.vocab_size)
    with torch.device("meta"):
        model = Llama(settings)
    fill(model, folder, LLAMA, device, dtype)
    tie(model)
    return model.eval()


def _cut_vocabulary(model: Llava, config: dict) -> None:
    """Drop the rows that llava-hf has for <image> and what comes behind: our own export tells how many there were
    before; in others' folders <image> comes right behind the tokenizer's pieces."""
    rows = config.get("rows_before_image")
    if rows is None and model.tokenizer and model.tokenizer.vocab_size == config.get("image_token_index"):
        rows = model.tokenizer.vocab_size
    if rows is not None:
        cut_vocabulary(model.language, rows)
        if model.tokenizer:
            model.tokenizer.added = {token: i for token, i in model.tokenizer.added.items() if i < rows}
            check_tokenizer(model.tokenizer, rows)


def _tokenizer(folder: Path, rows: int) -> Tokenizer | None:
    """The folder's tokenizer, if it has one, found to fit an embedding of so many rows."""
    if not (folder / "tokenizer.model").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, rows)
    return tokenizer


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
        _write_tokenizer(tokenizer, new, llm.config.max_position_embeddings)
        write_tensors(llm, new, LLAMA, dtype)


def write(model: Llava, folder: Path, dtype: Dtype = None) -> None:
    """The files of `save` into a folder that exists: for a block of `atomic_folder` that writes others beside them."""
    write_settings(model, folder, dtype or model.language.norm.weight.dtype)
    write_tensors(model, folder, LLAVA, dtype)


def write_settings(model: Llava, folder: Path, dtype: torch.dtype) -> None:
    """Config and tokenizer beside weights of that dtype."""
    files.write_json(folder / "config.json", fields.llava_fields(model.config, dtype))
    _write_tokenizer(model.tokenizer, folder, model.config.max_length)


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path, max_length: int) -> None:
    """tokenizer.model, and the settings that decide its spacing."""
    if tokenizer is None:
        return
    shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
    if tokenizer.added:
        files.write_json(folder / "added_tokens.json", tokenizer.added)
    files.write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, max_length))


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict:
    """tokenizer_config.json, as LlamaTokenizer writes it."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    flags = {"legacy": tokenizer.legacy, "add_bos_token": True, "add_eos_token": False, "model_max_length": max_length}
    return {"tokenizer_class": "LlamaTokenizer", **special, **flags}


if __name__ == "__main__":
    from nanollava.convert import main  # it builds on this module

    raise SystemExit(main())
