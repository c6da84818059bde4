"""python -m nanollava.instruct --contexts FILE.jsonl --out DIR [--teacher endpoint --teacher-model NAME] [options]

Captions and boxes become instruction data by way of a teacher that sees only these (LLaVA section 3): conversations,
detailed descriptions and complex reasoning, in the paper's proportions. Stop it when you like; the same command goes on
and asks for nothing twice. `python -m nanollava.instruct brief` makes stage 1's records of captions, without a teacher;
`balance` chooses among captions by their noun phrases, as the paper did.
"""

import argparse
import sys
from pathlib import Path

from nanollava.error import Error, forgive_encoding, say
from nanollava.instruct import balance, brief
from nanollava.instruct.contexts import add_input_options, read_input
from nanollava.instruct.messages import FOLDER, KINDS, read_prompts
from nanollava.instruct.plan import make_plan
from nanollava.instruct.run import Run, rehearse
from nanollava.instruct.teacher import add_teacher_options, check_options, open_teacher
from nanollava.train.keep import alone

COMMANDS = {"brief": brief.main, "balance": balance.main}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 where requests stayed unanswered, 2 after one line that says
    what was wrong, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    command = COMMANDS.get(argv[0]) if argv else None
    forgive_encoding()
    try:
        return command(argv[1:]) if command else generate(arguments(argv))
    except KeyboardInterrupt:
        kept = "nothing was written" if command else "the same command goes on from here"
        print(f"\nstopped: {kept}", file=sys.stderr)
        return 130
    except Exception as error:
        return say(error)


def arguments(argv: list[str]) -> argparse.Namespace:
    usage, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m nanollava.instruct", usage=usage, description=text)
    add_input_options(parser)
    add = parser.add_argument
    add(
        "--out", type=Path, metavar="DIR", help="the folder that the run writes to: instruct.json and how it came about"
    )
    add("--records", type=int, metavar="N", help="how many; default: all that the images allow, each kind once")
    add("--kinds", default=",".join(KINDS), metavar="A,B", help=f"some of {','.join(KINDS)} (default: all)")
    add("--seed", type=int, default=0, help="another one chooses other images for each kind (0)")
    add("--prompts", type=Path, default=FOLDER, metavar="DIR", help="a changed copy of nanollava/instruct/prompts")
    again = "ask once more for what was rejected; miniature, and a FOLDER at temperature 0, say the same again"
    add("--ask-again", action="store_true", help=again)
    add("--dry-run", action="store_true", help="print a prompt of each kind and the tokens of the run; ask nobody")
    add_teacher_options(parser)
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> int:
    """The three kinds of record; the exit status."""
    check_options(args)
    if not args.out and not args.dry_run:
        raise Error("give --out DIR, a folder for the records, or --dry-run")
    prompts, contexts = read_prompts(args.prompts), read_input(args)
    plan = make_plan(contexts, chosen_kinds(args.kinds), args.records, args.seed)
    if args.dry_run:
        print(rehearse(plan, prompts))
        return 0
    teacher = open_teacher(args)
    with alone(args.out), Run(args.out, plan, prompts, contexts, teacher, args.seed) as run:
        unanswered = run.ask(args.concurrency, args.ask_again)
        print(run.finish(unanswered))
    return 1 if unanswered else 0


def chosen_kinds(words: str) -> list[str]:
    """Raises Error for a kind that there is not."""
    kinds = [word.strip() for word in words.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise Error(f"--kinds {unknown[0]}: no such kind; choose from {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in kinds]


if __name__ == "__main__":
    sys.exit(main())
