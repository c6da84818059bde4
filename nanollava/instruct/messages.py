"""Prompts, read from a folder of plain text files, become the messages of a request (LLaVA section 3 and appendix).

FOLDER/{conversation,detail,reasoning}/system_message.txt       what is asked for
FOLDER/{conversation,detail,reasoning}/000_caps.txt, 000_conv.txt, 001_caps.txt, ...    examples: input, reply
FOLDER/brief.txt     questions for stage 1, one on a line
FOLDER/detail.txt    questions for the detailed descriptions, one on a line
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from nanollava.error import Error
from nanollava.files import plain_text
from nanollava.instruct.contexts import Context
from nanollava.instruct.replies import Unusable, turns_of
from nanollava.tokenizer import IMAGE_TOKEN

FOLDER = Path(__file__).parent / "prompts"
KINDS = ("conversation", "detail", "reasoning")
AROUND = 4  # tokens that a chat format spends around each message, about


@dataclass(frozen=True)
class Prompts:
    """What stands in a folder of prompts.

    beginnings: for each kind its system message, then the examples as turns of the user's and the assistant's.
    """

    beginnings: dict[str, list[dict]]
    brief: list[str]
    detail: list[str]

    @property
    def checksum(self) -> str:
        """Tells other prompts from these."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def messages(self, kind: str, context: Context) -> list[dict]:
        """What a teacher is asked, the image in words last; boxes for all but conversations."""
        return [*self.beginnings[kind], {"role": "user", "content": context.text(boxes=kind != "conversation")}]

    def reply_tokens(self, kind: str) -> int:
        """About how many tokens a reply takes: the mean of the examples, 300 where there are none."""
        replies = [message["content"] for message in self.beginnings[kind] if message["role"] == "assistant"]
        return sum(map(estimate, replies)) // len(replies) if replies else 300


def read_prompts(folder: Path) -> Prompts:
    """Raises Error for a file that is missing, empty, or no good: an example whose reply could not be used itself."""
    if not folder.is_dir():
        raise Error(f"{folder}: no such folder of prompts; copy {FOLDER} and change the copy")
    beginnings = {kind: read_beginning(folder / kind, kind) for kind in KINDS}
    return Prompts(beginnings, questions(folder / "brief.txt"), questions(folder / "detail.txt"))


def read_beginning(folder: Path, kind: str) -> list[dict]:
    """The system message, and the examples by their numbers."""
    messages = [{"role": "system", "content": read(folder / "system_message.txt")}]
    names = [file.name for file in folder.glob("*.txt") if re.fullmatch(r"\d+_(caps|conv)\.txt", file.name)]
    for number in sorted({name.partition("_")[0] for name in names}):
        given, reply = read(folder / f"{number}_caps.txt"), read(folder / f"{number}_conv.txt")
        try:
            turns_of(kind, reply)
        except Unusable as error:
            raise Error(f"{folder / f'{number}_conv.txt'}: {error}; such a reply would be rejected") from error
        messages += [{"role": "user", "content": given}, {"role": "assistant", "content": reply}]
    return messages


def questions(file: Path) -> list[str]:
    """The lines of a file that are not empty."""
    found = [line.strip() for line in read(file).split("\n") if line.strip()]
    if marked := [line for line in found if IMAGE_TOKEN in line]:
        raise Error(f"{file}: {marked[0]!r} holds {IMAGE_TOKEN}; leave it out, it is put there in making the records")
    return found


def read(file: Path) -> str:
    """The text of one of the files of a folder of prompts."""
    return plain_text(file, f"write it, or take it from {FOLDER}")


def estimate(text: str) -> int:
    """About how many tokens a GPT-4 reads in an English text: each word, up to three digits and each other sign count
    as one."""
    return len(re.findall(r"[^\W\d_]+|\d{1,3}|[^\w\s]|\n+", text))


def estimate_messages(messages: list[dict]) -> int:
    return sum(estimate(message["content"]) + AROUND for message in messages)
