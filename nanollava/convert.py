"""python -m nanollava.checkpoint to-safetensors|apply-delta|export|make-random ...

What can be done to checkpoint folders:
    to-safetensors SRC DST          the same tensors under the same names in .safetensors files, which run no code
    apply-delta BASE DELTA DST      LLaVA v0 and v1.1 were published as differences from LLaMA: their sum
    export --as llava-hf SRC DST    a LLaVA as transformers' LlavaForConditionalGeneration reads it; its projector must
                                    be v1.5's (mlp2x_gelu)
    export --as llava SRC DST       a LLaVA in the official layout of v1.5, which is also ours, its image tower among
                                    its tensors; of a LoRA or an mm_projector.bin a whole model
    make-random --like SIZE DST     a LLaVA of an official size with random weights, to try what this machine can hold
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanollava import config as fields
from nanollava import folder as files
from nanollava import layouts
from nanollava.checkpoint import write_settings
from nanollava.error import Error, forgive_encoding, say, some
from nanollava.export import check_new, export
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import Tokenizer, check_tokenizer
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
    """Write the folder ``target``: the files of ``source``, its .bin weights as .safetensors, shard for shard. What is
    no part of a whole model (mm_projector.bin and the like) and subfolders but vision_tower/ stay behind.

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
        files.write_json(folder / "model.safetensors.index.json", index)


def copy_settings(source: Path, target: Path) -> None:
    """All files of a folder but the weights and their index; an image tower in it as it is."""
    if (source / "vision_tower").is_dir():
        shutil.copytree(source / "vision_tower", target / "vision_tower")
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
    if base.resolve() == delta.resolve():
        raise Error(f"{base}: given as base and as delta; give the LLaMA that the delta was made from, and the delta")
    for folder, kinds in ((base, ["llama"]), (delta, ["llava", "llava_llama"])):
        fields.check_kind(files.read_json(folder / "config.json"), folder / "config.json", *kinds)
    known, asked = stored_shapes(base), stored_shapes(delta)
    alone = [name for name in asked if name not in known and not name.endswith(TAKEN_AS_IS)]
    unfit = [name for name in asked if name in known and not can_add(name, known[name], asked[name])]
    unused = [name for name in known if name not in asked and not name.endswith(TAKEN_AS_IS)]
    kinds = (("in the delta alone", alone), ("in the base alone", unused), ("of sizes that do not fit", unfit))
    if problems := [f"{some(names)} {kind}" for kind, names in kinds if names]:
        raise Error(f"{base}: not the base of {delta}: tensors {'; '.join(problems)}; give the LLaMA it was made from")
    where = {name: file for file in files.weight_files(base) for name in files.shapes(file)}
    shards = files.weight_files(delta)
    with files.atomic_folder(target) as new:
        write_shards((summed(shard, where) for shard in shards), len(shards), new)
        copy_settings(delta, new)


def can_add(name: str, base: tuple[int, ...], delta: tuple[int, ...]) -> bool:
    """Whether shapes agree, or the delta's has rows for the tokens that were added."""
    widened = name in WIDENED and len(base) == 2 and base[1:] == delta[1:] and base[0] < delta[0]
    return base == delta or widened


def summed(shard: Path, where: dict[str, Path]) -> dict[str, Tensor]:
    """The tensors of a delta's file with those of the base, which are in the files ``where``, added."""
    sums = {name: value.contiguous().clone() for name, value in files.tensors(shard)}
    for file in {where[name] for name in sums if name in where}:
        for name, value in files.tensors(file):
            if name in sums and where[name] == file and not name.endswith(TAKEN_AS_IS):
                halves = value.is_floating_point() and sums[name].is_floating_point() and sums[name].itemsize > 1
                if halves:
                    sums[name][: len(value)] += value.to(sums[name].dtype)
                if not halves or not finite(sums[name]):
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments(argv)
    forgive_encoding()
    try:
        COMMANDS[args.pop("command")](**args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        return say(error)
    return 0


def arguments(argv: list[str] | None) -> dict:
    """The command, and the arguments of its function by name."""
    parser = argparse.ArgumentParser(
        prog="python -m nanollava.checkpoint",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add = {name: commands.add_parser(name).add_argument for name in COMMANDS}
    sources = (("to-safetensors", "source"), ("apply-delta", "base"), ("apply-delta", "delta"), ("export", "source"))
    for name, folder in sources:
        add[name](folder, type=Path, help="a checkpoint folder")
    for option in add.values():
        option("target", type=Path, help="a new folder")
    export_option, random_option = add["export"], add["make-random"]
    export_option("--as", dest="kind", choices=("llava-hf", "llava"), required=True)
    half = {"dest": "dtype", "action": "store_const", "const": torch.float16}
    export_option("--fp16", **half, help="weights in float16: half of what training stores")
    export_option("--vision", type=Path, help="the CLIP folder, for weights without an image tower")
    export_option("--base", type=Path, help="the language model that a LoRA or a projector was trained on")
    random_option("--like", choices=OFFICIAL, required=True)
    random_option("--tokenizer", type=Path, help="a tokenizer.model for it, to talk to it")
    return vars(parser.parse_args(argv))


COMMANDS = {
    "to-safetensors": to_safetensors, "apply-delta": apply_delta, "export": export, "make-random": make_random
}  # fmt: skip
