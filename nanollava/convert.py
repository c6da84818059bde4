"""python -m nanollava.checkpoint to-safetensors|export ...

What can be done to checkpoint folders:
    to-safetensors SRC DST          the same tensors under the same names in .safetensors files, which run no code
    export --as llava-hf SRC DST    a LLaVA as transformers' LlavaForConditionalGeneration reads it
    export --as llava SRC DST       a LLaVA in the official layout of v1.5, its image tower among its tensors
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanollava import config as fields
from nanollava import folder as files
from nanollava import images, layouts
from nanollava.checkpoint import load, save
from nanollava.error import Error, forgive_encoding, say
from nanollava.llava import Llava


def to_safetensors(source: Path, target: Path) -> None:
    """Write the folder ``target``: all of ``source``, its .bin weights as .safetensors, shard for shard.

    Raises Error where there are no .bin weights, for damaged ones, and where the disk is full; then nothing is left.
    """
    shards = files.weight_files(source)
    if shards[0].suffix != ".bin":
        raise Error(f"{source}: its weights are {shards[0].suffix} files already; nothing to convert")
    check_new(target)
    with files.atomic_folder(target) as new:
        weight_map, total = {}, 0
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            # a matrix that two names share is written twice: safetensors knows no sharing
            tensors = {tensor: value.contiguous().clone() for tensor, value in files.tensors(shard)}
            save_file(tensors, new / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(value.nbytes for value in tensors.values())
            print(f"{shard.name} -> {name}: {len(tensors)} tensors", flush=True)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".bin" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, new / file.name)


def check_new(target: Path) -> None:
    """Raises Error where no new folder can be made."""
    files.check_writable(target)
    if target.exists():
        raise Error(f"{target} exists: choose another folder")


def export(source: Path, target: Path, kind: str, dtype: torch.dtype | None = None, vision: Path | None = None) -> None:
    """Write any LLaVA that ``load`` reads as ``kind``, "llava-hf" or "llava"; dtype None keeps that of its weights.

    Raises Error as ``load`` does, and for a linear projector as llava-hf, which knows only v1.5's.
    """
    check_new(target)
    stored = next(
        value.dtype for file in files.weight_files(files.last_good(source)) for _, value in files.tensors(file)
    )
    model = load(source, dtype=dtype or stored, vision=vision)
    if kind == "llava":
        save(model, target)
        return
    if model.config.projector_type != "mlp2x_gelu":
        raise Error(f"{source}: its projector is {model.config.projector_type}; llava-hf knows only mlp2x_gelu")
    with files.atomic_folder(target) as new:
        write_llava_hf(model, new)


def write_llava_hf(model: Llava, folder: Path) -> None:
    """The files of a llava-hf folder: weights, config, and what its processor needs. <image> and <pad> get the two ids
    behind the vocabulary, which is then filled up to a multiple of 64 with rows that are the mean of all others: so
    none of them is ever the likeliest token."""
    V, dtype = model.config.language.vocab_size, model.language.norm.weight.dtype
    rows = -(-(V + 2) // 64) * 64
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in ("language.embed_tokens.weight", "language.lm_head.weight"):
            mean = tensor.float().mean(dim=0).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows - V, -1)])
        tensors[layouts.theirs(name, layouts.LLAVA_HF)] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"config.json": fields.llava_hf_fields(model.config, dtype, V, rows), **processor(model)}
    if model.tokenizer:
        shutil.copyfile(model.tokenizer.file, folder / "tokenizer.model")
        settings |= tokenizer_settings(model, V)
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def processor(model: Llava) -> dict[str, dict]:
    """preprocessor_config.json and processor_config.json: how transformers makes pixels, and widens <image>."""
    S, pad = model.config.vision.image_size, model.config.image_aspect_ratio == "pad"
    pixels = {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        **({"do_pad": True} if pad else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": S},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": S, "width": S},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.MEAN,
        "image_std": images.STD,
    }
    words = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": model.config.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return {"preprocessor_config.json": pixels, "processor_config.json": words}


def tokenizer_settings(model: Llava, image_token: int) -> dict[str, dict]:
    """tokenizer_config.json and added_tokens.json, with <image> and <pad>."""
    added = {"<image>": image_token, "<pad>": image_token + 1}
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": model.tokenizer.legacy,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": model.config.max_length,
        "added_tokens_decoder": {str(i): {"content": name, **special} for name, i in added.items()},
    }
    return {"tokenizer_config.json": config, "added_tokens.json": added}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        usage=__doc__.splitlines()[0], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="to-safetensors|export")
    for name in ("to-safetensors", "export"):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, help="a checkpoint folder")
        command.add_argument("target", type=Path, help="a new folder")
        if name == "export":
            command.add_argument("--as", dest="kind", choices=("llava-hf", "llava"), required=True)
            command.add_argument(
                "--fp16", action="store_true", help="weights in float16, as the hubs usually hold them"
            )
            command.add_argument("--vision", type=Path, help="the CLIP folder, for weights without an image tower")
    args = parser.parse_args(argv)
    forgive_encoding()
    try:
        if args.command == "to-safetensors":
            to_safetensors(args.source, args.target)
        else:
            export(args.source, args.target, args.kind, torch.float16 if args.fp16 else None, args.vision)
    except Exception as error:
        return say(error)
    return 0
