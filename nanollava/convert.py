"""python -m nanollava.checkpoint to-safetensors|apply-delta|export|make-random ...

What can be done to checkpoint folders:
    to-safetensors SRC DST          the same tensors under the same names in .safetensors files, which run no code
    apply-delta BASE DELTA DST      LLaVA v0 and v1.1 were published as differences from LLaMA or Vicuna: their sum
    export --as llava-hf SRC DST    a LLaVA as transformers' LlavaForConditionalGeneration reads it
    export --as llava SRC DST       a LLaVA in the official layout of v1.5, its image tower among its tensors; of a
                                    LoRA or an mm_projector.bin a whole model
    make-random --like SIZE DST     a LLaVA of an official size with random weights, to try what this machine can hold
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanollava import config as fields
from nanollava import folder as files
from nanollava import images, layouts
from nanollava.checkpoint import check_tokenizer, language_folder, load, save, write_settings
from nanollava.error import Error, forgive_encoding, say
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import Tokenizer, added_tokens
from nanollava.vit import VisionConfig
from nanollava.weights import finite, stored_shapes

TAKEN_AS_IS = (*layouts.PASSED_OVER, *(f".mm_projector.{part}" for part in ("weight", "bias")))  # of a delta
WIDENED = ("model.embed_tokens.weight", "lm_head.weight")  # have rows for the tokens that were added
SHARD = 5 * 10**9  # bytes, as on the hubs
TOWER = VisionConfig(336, 14, 1024, 4096, 24, 16)
OFFICIAL = {
    "llava-1.5-7b": LlavaConfig(
        TOWER, LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096), "mlp2x_gelu", image_aspect_ratio="pad"
    ),
    "llava-1.5-13b": LlavaConfig(
        TOWER, LlamaConfig(32000, 5120, 13824, 40, 40, rms_norm_eps=1e-5, max_position_embeddings=4096), "mlp2x_gelu",
        image_aspect_ratio="pad",
    ),
}  # fmt: skip


def to_safetensors(source: Path, target: Path) -> None:
    """Write the folder ``target``: all of ``source``, its .bin weights as .safetensors, shard for shard.

    Raises Error where there are no .bin weights, for damaged ones, and where the disk is full; then nothing is left.
    """
    check_new(target, source)
    shards = files.weight_files(source)
    if shards[0].suffix != ".bin":
        raise Error(f"{source}: its weights are {shards[0].suffix} files already; nothing to convert")
    with files.atomic_folder(target) as new:
        # a matrix that two names share is written twice: safetensors knows no sharing
        parts = ({name: value.contiguous().clone() for name, value in files.tensors(shard)} for shard in shards)
        write_shards(parts, len(shards), new)
        copy_settings(source, new)


def write_shards(parts: Iterable[dict[str, Tensor]], count: int, folder: Path) -> None:
    """Tensors under their names in ``count`` files with an index, or in one file. Only one part is held in memory."""
    weight_map, total = {}, 0
    for number, tensors in enumerate(parts, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
        print(f"{name}: {len(tensors)} tensors", flush=True)
        tensors.clear()  # or the next part would be made while this one is still held
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_settings(source: Path, target: Path) -> None:
    """All files of a folder but the weights and their index."""
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".bin", ".safetensors") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def apply_delta(base: Path, delta: Path, target: Path) -> None:
    """Write the folder ``target``: ``delta`` with the tensors of ``base`` added, in the delta's dtype.

    The embedding and the head of a delta have rows for tokens that the base does not know: the base is added to the
    rows in front. What the base does not have at all, the projector, is taken as it is. Raises Error where the two do
    not belong together, for damaged weights, and where the disk is full; then nothing is left.
    """
    check_new(target, base, delta)
    for folder, kinds in ((base, ["llama"]), (delta, ["llava", "llava_llama"])):
        fields.check_kind(files.read_json(folder / "config.json"), folder / "config.json", *kinds)
    known, asked = stored_shapes(base), stored_shapes(delta)
    alone = [name for name in asked if name not in known and not name.endswith(TAKEN_AS_IS)]
    cut = {n: (min(known.get(n, shape)[:1] + shape[:1]), *shape[1:]) for n, shape in asked.items() if n in WIDENED}
    unfit = [n for n in asked if n in known and known[n] != cut.get(n, asked[n])]
    unused = [name for name in known if name not in asked and not name.endswith(TAKEN_AS_IS)]
    kinds = (("in the delta alone", alone), ("in the base alone", unused), ("of sizes that do not fit", unfit))
    if problems := [f"{files.some(names)} {kind}" for kind, names in kinds if names]:
        raise Error(f"{base}: not the base of {delta}: tensors {'; '.join(problems)}; give the LLaMA it was made from")
    where = {name: file for file in files.weight_files(base) for name in files.shapes(file)}
    shards = files.weight_files(delta)
    with files.atomic_folder(target) as new:
        write_shards((summed(shard, where) for shard in shards), len(shards), new)
        copy_settings(delta, new)


def summed(shard: Path, where: dict[str, Path]) -> dict[str, Tensor]:
    """The tensors of a delta's file with those of the base, which are in the files ``where``, added."""
    sums = {name: value.contiguous().clone() for name, value in files.tensors(shard)}
    for file in {where[name] for name in sums if name in where}:
        for name, value in files.tensors(file):
            if name in sums and where[name] == file and not name.endswith(TAKEN_AS_IS):
                sums[name][: len(value)] += value.to(sums[name].dtype)
                if not value.is_floating_point() or not finite(sums[name]):
                    raise Error(f"{file}: with the delta, {name} is NaN, infinite or no floats; fetch both again")
    return sums


def make_random(like: str, target: Path, tokenizer: Path | None = None) -> None:
    """Write a LLaVA of an official size in the official layout, bfloat16, its image tower among its tensors, all
    weights drawn at random. ``tokenizer``: a tokenizer.model for it, without which it cannot converse.

    Raises Error where the disk is full, and for a tokenizer of another size.
    """
    check_new(target)
    with torch.device("meta"):
        model = Llava(OFFICIAL[like], Tokenizer(tokenizer, legacy=False) if tokenizer else None)
    if model.tokenizer:
        check_tokenizer(model.tokenizer, model.config.language.vocab_size)
    shards, room = [[]], SHARD
    for name, tensor in model.state_dict().items():
        if 2 * tensor.numel() > room:
            shards.append([])
            room = SHARD
        room -= 2 * tensor.numel()
        shards[-1].append((layouts.theirs(name, layouts.LLAVA), tensor.shape))
    torch.manual_seed(0)
    with files.atomic_folder(target) as new:
        write_shards(({name: draw(name, shape) for name, shape in shard} for shard in shards), len(shards), new)
        write_settings(model, new, torch.bfloat16)


def draw(name: str, shape: torch.Size) -> Tensor:
    """A random matrix, small enough that a network of them gives finite numbers; what scales is one."""
    if len(shape) == 1:
        return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def check_new(target: Path, *sources: Path) -> None:
    """Raises Error where no new folder can be made, or a source is none."""
    for source in sources:
        if not files.last_good(source).is_dir():
            raise Error(f"{source}: no such folder; check the path")
    target = target.resolve()  # x/../y is y even where there is no x
    files.check_writable(target)
    if target.exists():
        raise Error(f"{target} exists: choose another folder")


def export(
    source: Path,
    target: Path,
    kind: str,
    dtype: torch.dtype | None = None,
    vision: Path | None = None,
    base: Path | None = None,
) -> None:
    """Write any LLaVA that ``load`` reads as ``kind``, "llava-hf" or "llava"; dtype None keeps that of its weights.

    Raises Error as ``load`` does, and where llava-hf, which knows only v1.5, lacks what the model has: a linear
    projector, tokens around its images.
    """
    check_new(target, source)
    weights = files.weight_files(language_folder(files.last_good(source), base))
    floats = (v.dtype for file in weights for name, v in files.tensors(file)
              if v.is_floating_point() and not name.endswith(layouts.PASSED_OVER))  # fmt: skip
    stored = next(floats, None)
    model = load(source, dtype=dtype or stored, vision=vision, base=base)
    if kind == "llava":
        save(model, target)
        return
    if model.config.projector_type != "mlp2x_gelu":
        raise Error(f"{source}: its projector is {model.config.projector_type}; llava-hf knows only mlp2x_gelu")
    if model.config.use_im_start_end:
        raise Error(f"{source}: its images stand between <im_start> and <im_end>, which llava-hf does not know")
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
    """tokenizer_config.json and added_tokens.json, with <image> and <pad> besides the tokens added before."""
    known = {token: i for token, i in added_tokens(model.tokenizer.file.parent).items() if i < image_token}
    added = known | {"<image>": image_token, "<pad>": image_token + 1}
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
        prog="python -m nanollava.checkpoint",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, *folders in (
        ("to-safetensors", "source", "target"),
        ("apply-delta", "base", "delta", "target"),
        ("export", "source", "target"),
        ("make-random", "target"),
    ):
        command = commands.add_parser(name)
        for folder in folders:
            command.add_argument(
                folder, type=Path, help="a new folder" if folder == "target" else "a checkpoint folder"
            )
        if name == "export":
            command.add_argument("--as", dest="kind", choices=("llava-hf", "llava"), required=True)
            command.add_argument(
                "--fp16",
                dest="dtype",
                action="store_const",
                const=torch.float16,
                help="weights in float16, as the hubs hold them",
            )
            command.add_argument("--vision", type=Path, help="the CLIP folder, for weights without an image tower")
            command.add_argument(
                "--base", type=Path, help="the language model that a LoRA or a projector was trained on"
            )
        if name == "make-random":
            command.add_argument("--like", choices=OFFICIAL, required=True)
            command.add_argument("--tokenizer", type=Path, help="a tokenizer.model for it, to talk to it")
    args = vars(parser.parse_args(argv))
    forgive_encoding()
    try:
        COMMANDS[args.pop("command")](**args)
    except Exception as error:
        return say(error)
    return 0


COMMANDS = {
    "to-safetensors": to_safetensors, "apply-delta": apply_delta, "export": export, "make-random": make_random
}  # fmt: skip
