"""python chat.py [FOLDER] [--image FILE] [--ask TEXT]

Talks about an image in the terminal: the bundled miniature and its sample image, or any LLaVA folder and any image.
Questions come from the keyboard, from a pipe (then only the answers are printed, up to the first question or command
that fails), or, a single one, from --ask.
Exit status: 0; 2 after one line that says what was wrong; 130 when Ctrl-C came before there was a prompt.
"""

import argparse
import math
import os
import sys
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

from nanollava.error import Error, forgive_encoding, say  # what needs PyTorch is imported late: --help is instant

MINIATURE = Path(__file__).resolve().parent / "weights" / "miniature"
SAMPLE = MINIATURE / "sample.png"

HELP = """\
/image FILE   look at another image; the conversation starts anew
/reset        forget the conversation, keep the image
/help         this list
/quit         leave (or Ctrl-D)
Ctrl-C ends an answer early. Everything else that you type is a question."""

STAGE_1 = """\
This is a stage-1 checkpoint: an aligned projector in front of a language model that was not tuned to converse.
It captions the image, whatever you say; for a conversation take a stage-2 checkpoint."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = arguments(argv)
    forgive_encoding()
    try:
        return run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        return say(error)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    command, *description = __doc__.splitlines()
    parser = argparse.ArgumentParser(usage=f"{command} [options]", description=" ".join(description[1:5]))
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=MINIATURE, help="a LLaVA checkpoint; default: the bundled miniature")
    add("--image", metavar="FILE", type=Path, help="what to talk about; the miniature has a sample image")
    add("--ask", metavar="TEXT", help="answer this one question and leave")
    add(
        "--vision",
        metavar="FOLDER",
        type=Path,
        help="the CLIP folder, where FOLDER has no image tower in it; default: the one beside it",
    )
    add("--base", metavar="FOLDER", type=Path, help="the language model that a LoRA or a projector was trained on")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, otherwise cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, or if memory is short")
    add("--compile", action="store_true", help="compile decoding: the first answer waits a minute, words come faster")
    add("--int8", action="store_true", help="8 bits for a weight of the language model, compiled: less memory, faster")
    add("--temperature", type=float, default=0.0, help="0 (default): the most likely words; 1: as varied as the model")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest words that together have this probability")
    add("--top-k", type=int, default=0, help="draw among this many of the likeliest words")
    add("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add("--seed", type=int, help="draw the same answers in every run")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    talk = Talk(args)
    if args.ask is not None:
        talk.ask(args.ask)
    else:
        talk.converse()
    if talk.blind:
        print("No --image was given: answered from the text alone.", file=sys.stderr)
    return 0


class Talk:
    """One run of this program: a conversation, the image it is about, and whether a person sits at the keyboard."""

    def __init__(self, args: argparse.Namespace):
        from nanollava.generate import Chat, Sampling
        from nanollava.images import check_image

        self.image: Path | None = args.image
        if args.image is None and args.folder.resolve() == MINIATURE and SAMPLE.is_file():
            self.image = SAMPLE
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
        sampling = {name: getattr(args, name) for name in names}
        Sampling(**sampling)  # what is wrong with these or the image is said before the weights are read
        if self.image:
            check_image(self.image)
        model = load(args)
        self.chat = Chat(model, **sampling)
        self.chat.reset(self.image)
        self.terminal = args.ask is None and sys.stdin is not None and sys.stdin.isatty()
        self.blind = False  # whether somebody who sees no prompt got an answer without having shown an image
        matrices = (buffer for buffer in model.buffers() if buffer.dim() > 1)  # int8 weights are buffers
        size = sum(tensor.numel() for tensor in chain(model.parameters(), matrices))
        self.title = f"{os.path.relpath(args.folder)}: {size / 1e6:,.1f} million parameters on {model.device}"
        if self.chat.captioner:
            print(STAGE_1, file=sys.stderr)

    def ask(self, question: str) -> None:
        """Print the answer as it comes. Raises what Chat.say does; what came until then has been printed."""
        with closing(self.chat.say(question)) as pieces:
            for piece in chain(pieces, ["\n"]):
                print(piece, end="", flush=True)
        self.blind = not self.image and not self.terminal

    def converse(self) -> None:
        """Questions and commands, line by line, until /quit, the end of the input, or Ctrl-C at the prompt."""
        if self.terminal:
            self._greet()
        while True:
            try:
                line = input("> " if self.terminal else "").strip()
            except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no input at all
                self._note("")
                return
            if line.lower() in ("/quit", "/exit"):
                return
            try:
                self._handle(line)
            except Error as error:
                if not self.terminal:  # what follows in a pipe may build on it
                    raise
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print()  # behind the part of the answer that is already there

    def _greet(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  (its import gives input() line editing and a history)
        self._note(self.title)
        self._note(self._looking())
        self._note("Ask a question; /help lists the commands, Ctrl-D ends.")

    def _handle(self, line: str) -> None:
        """One line of input: a command or a question."""
        command, rest = [*line.split(maxsplit=1), "", ""][:2]
        command = command.lower()
        if command == "/image":
            self._show(rest.strip())
        elif command == "/reset":
            self.chat.reset(self.image)
            self._note("The conversation starts anew.")
        elif command == "/help":
            print(HELP)
        elif command.startswith("/"):
            raise Error(f"{command}: no such command; /help lists them")
        elif line:
            self.ask(line)

    def _show(self, name: str) -> None:
        """Begin a new conversation about the image of that name, written as terminals do when a file is dropped."""
        if name:
            file = Path(name.strip("'\"").replace("\\ ", " "))
            try:
                file = file.expanduser()
            except RuntimeError as error:
                raise Error(f"{file}: no such user's home; give the whole path") from error
            self.chat.reset(file)
            self.image = file
        self._note(self._looking())

    def _looking(self) -> str:
        return f"Looking at {os.path.relpath(self.image)}." if self.image else "No image yet: /image FILE shows one."

    def _note(self, text: str) -> None:
        """A remark for whoever sits at the keyboard; a pipe gets answers only."""
        if self.terminal:
            print(text)


def load(args: argparse.Namespace):
    """The model that the arguments ask for. Raises Error where it cannot be loaded."""
    import torch

    import nanollava
    from nanollava.decoding import compile_decoding
    from nanollava.quantize import quantize

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if dtype is None and device == "cpu" and not fits(args.folder, args.base):
        print("In float32 the weights would not fit in memory: they are loaded as bfloat16.", file=sys.stderr)
        dtype = torch.bfloat16
    model = nanollava.load(args.folder, device, dtype, args.vision, args.base)
    if args.int8:
        quantize(model)
    return compile_decoding(model) if args.compile or args.int8 else model


def fits(folder: Path, base: Path | None = None) -> bool:
    """Whether the weights of a folder, four bytes a number, leave a tenth of this machine's memory free."""
    from nanollava.folder import last_good
    from nanollava.places import language_folder
    from nanollava.weights import stored_shapes

    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}) or not (folder / "config.json").is_file():
        return True  # not known; of a folder that is no checkpoint, loading says it better
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    numbers = sum(map(math.prod, stored_shapes(language_folder(last_good(folder), base)).values()))
    return 4 * numbers < 0.9 * memory


if __name__ == "__main__":
    sys.exit(main())
