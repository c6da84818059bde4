"""python -m nanollava.checkpoint to-safetensors SRC DST

What can be done to checkpoint folders:
    to-safetensors   the same tensors under the same names in .safetensors files, which load faster and run no code
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from nanollava import folder as files
from nanollava.error import Error, forgive_encoding, one_line


def to_safetensors(source: Path, target: Path) -> None:
    """Write the folder ``target``: all of ``source``, its .bin weights as .safetensors, shard for shard.

    Raises Error where there are no .bin weights, for damaged ones, and where the disk is full; then nothing is left.
    """
    shards = files.weight_files(source)
    if shards[0].suffix != ".bin":
        raise Error(f"{source}: its weights are {shards[0].suffix} files already; nothing to convert")
    files.check_writable(target)
    if target.exists():
        raise Error(f"{target} exists: choose another folder")
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(usage=__doc__.splitlines()[0], description=__doc__.splitlines()[2])
    commands = parser.add_subparsers(required=True, metavar="to-safetensors")
    convert = commands.add_parser("to-safetensors", help="the same tensors in .safetensors files")
    convert.add_argument("source", type=Path, help="a folder with .bin weights")
    convert.add_argument("target", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    forgive_encoding()
    try:
        to_safetensors(args.source, args.target)
    except Exception as error:
        if not (line := one_line(error)):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0
