"""python -m nanollava.bench [--quick] [--models 135m,7b] [--device cpu] [--out bench.json]

How fast nanollava is on this machine: loading, image tower, prefill, decoding and the training steps of both stages,
for four architectures with random weights, beside the machine's own limits and, where it is installed, transformers at
the same work with the same weights. A table for reading on standard output, everything in a JSON file.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import torch

    from nanollava.bench import ladder, machine, measure, models, report
    from nanollava.bench.limits import Limits, measure_limits
    from nanollava.bench.rows import Row
    from nanollava.error import Error, forgive_encoding, say
    from nanollava.folder import read_json
    from nanollava.weights import check_device
except KeyboardInterrupt:  # to import PyTorch takes seconds
    sys.exit(130)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments(argv)
    forgive_encoding()
    try:
        device, names = settle(args)
        return ladder.main(device, tell) if args.ladder else run(args, device, names)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return say(error)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nanollava.bench", description=__doc__.partition("\n\n")[2])
    option = parser.add_argument
    option("--quick", action="store_true", help="the two small models, few repetitions: under two minutes")
    option("--models", metavar="A,B", help=f"some of {','.join(models.MODELS)}; by default all that the machine holds")
    option("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    option("--out", type=Path, help="the JSON file (default: bench.json)")
    option("--folder", type=Path, help="a 7B model in llava-hf layout, so that none has to be written")
    option("--ladder", action="store_true", help="what each optimisation brings on its own, on 135m; no JSON")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> tuple[torch.device, list[str]]:
    """The device and the models. Raises Error for what cannot be, before anything is measured."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    known = list(measure.QUICK if args.quick else models.MODELS)
    names = [name.strip().lower() for name in args.models.split(",")] if args.models else known
    if unknown := [name for name in names if name not in known]:
        raise Error(f"--models {unknown[0]}: no such model{' in --quick' * args.quick}; choose from {', '.join(known)}")
    if args.folder:
        check_folder(args.folder)
    if args.ladder and args.out:
        raise Error(f"--ladder and --out {args.out}: a ladder is a table and no JSON; leave one of them out")
    args.out = args.out or Path("bench.json")
    if not args.ladder:
        check_out(args.out)
    return torch.device(device), list(dict.fromkeys(names))


def check_folder(folder: Path) -> None:
    """Raises Error for a folder that is not a LLaVA-1.5-7B in llava-hf layout."""
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    large = isinstance(text, dict) and text.get("hidden_size", 4096) == 4096
    if config.get("model_type") != "llava" or not large:
        raise Error(f"--folder {folder}: is no 7B LLaVA in llava-hf layout; leave it out, and one is written")


def check_out(file: Path) -> None:
    """Raises Error where no such file can be written."""
    try:
        if file.is_dir():
            raise Error(f"--out {file}: is a folder; name a file")
        tempfile.TemporaryFile(dir=file.resolve().parent).close()
        if file.exists():
            file.open("a").close()
    except OSError as error:
        raise Error(f"--out {file}: cannot be written ({error.strerror}); choose another file") from error


def run(args: argparse.Namespace, device: torch.device, names: list[str]) -> int:
    """Measure, and tell what was measured even where Ctrl-C or an error came in between."""
    torch.manual_seed(0)
    rows = []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tell("limits of this machine")
    limits = measure_limits(device, dtype)
    status = 1  # of what is no user's mistake
    try:
        for row in measured(args, device, names, limits):
            rows.append(row)
            tell("  " + report.line(row))
        status = 0
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = say(error)
    finally:
        if rows:
            about = machine.description(device), limits, rows, device.type == "cuda"
            status = deliver(args.out, about, dtype, complete=not status) or status
    return status


def deliver(file: Path, about: tuple, dtype: torch.dtype, complete: bool) -> int:
    """The JSON, and then the table, which perhaps nobody reads any more: neither is lost with the other. The status."""
    status = 0
    try:
        report.write(file, *about, complete)
        tell(f"all figures: {file}")
    except Error as error:
        status = say(error)
    try:
        print(report.whole(*about, dtype), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        status = say(error)
    return status


def measured(args: argparse.Namespace, device: torch.device, names: list[str], limits: Limits) -> Iterator[Row]:
    """The rows of all models; their weights, which go when a model is done, in a temporary folder."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="nanollava-bench-") as work:
            efforts = measure.QUICK if args.quick else measure.ON_GPU if device.type == "cuda" else measure.FULL
            bench = measure.Bench(device, limits, Path(work), efforts, tell, args.folder, bool(args.models))
            yield from bench.rows(name)


def tell(line: str) -> None:
    """Progress: not for whoever reads the table from a pipe."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
