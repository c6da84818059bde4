"""python -m nanollava.instruct brief --captions FILE --out FILE.json

Stage 1's records (LLaVA section 4.2): a brief question about each image, answered by one of its captions. No teacher.
"""

import argparse
import json
import random
from pathlib import Path

from nanollava.error import Error
from nanollava.files import check_apart, write_whole
from nanollava.instruct.contexts import add_input_options, read_input
from nanollava.instruct.messages import FOLDER, read_prompts
from nanollava.instruct.replies import record_of


def main(argv: list[str]) -> int:
    """Raises Error for bad input; the exit status otherwise."""
    usage, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m nanollava.instruct brief", usage=usage, description=text)
    add_input_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--seed", type=int, default=0, help="another one chooses other questions and captions (0)")
    parser.add_argument("--prompts", type=Path, default=FOLDER, metavar="DIR", help="a folder with another brief.txt")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        raise Error(f"--out {args.out}: is a folder; name a file in it, {args.out / 'captions.json'}")
    check_apart(args.out, args.captions, args.contexts)
    questions, contexts = read_prompts(args.prompts).brief, read_input(args, boxes=False)
    records = []
    for context in contexts:
        rng = random.Random(f"{args.seed} {context.id} brief")
        records.append(record_of(context, "brief", [(rng.choice(questions), rng.choice(context.captions))], rng))
    args.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, "[" + ",\n ".join(map(json.dumps, records)) + "]\n")
    print(f"{args.out}: {len(records):,} records for stage 1")
    return 0
