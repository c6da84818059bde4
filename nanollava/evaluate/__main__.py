"""python -m nanollava.evaluate llava-bench | science-qa | ablations | miniature

How good is it? The paper's benchmarks (section 5) on any LLaVA folder, and its questions asked of the miniature:
    llava-bench   open questions, scored by a judge (section 5.1)
    science-qa    multiple choice with lectures and pictures (section 5.2)
    ablations     what the paper's own variants bring, at miniature scale
    miniature     questions about the drawn world, compared word for word
Each tells its steps and options with --help.
Exit status: 0; 1 where requests to a teacher stayed unanswered; 2 after one line that says what was wrong; 130 after
Ctrl-C.
"""

import argparse
import sys
from importlib import import_module

from nanollava.error import forgive_encoding, say

COMMANDS = {
    "llava-bench": "llava_bench",
    "science-qa": "science_qa",
    "ablations": "ablations",
    "miniature": "miniature",
}


def main(argv: list[str] | None = None) -> int:
    """Run one of the COMMANDS; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    description = __doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser(prog="python -m nanollava.evaluate", description=description, formatter_class=raw)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its steps and options")
    args = parser.parse_args(argv)
    forgive_encoding()
    try:
        return import_module(f"nanollava.evaluate.{args.command.replace('-', '_')}").main(args.rest)
    except KeyboardInterrupt:
        again = "begins anew" if args.command == "miniature" else "goes on where it stopped"
        print(f"\ninterrupted: the same command {again}", file=sys.stderr)
        return 130
    except Exception as error:
        return say(error)


if __name__ == "__main__":
    sys.exit(main())
