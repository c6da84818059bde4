"""One run of data generation in its folder.

OUT/settings.json    what the run is made with: seed, teacher, temperature, prompts, input; the folder takes no others
OUT/replies.jsonl    the journal: each reply as it came, written at once
OUT/rejected.jsonl   the replies that cannot become records, with the reason
OUT/instruct.json    the records in the official format, in the order of the plan: written at the end
"""

import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path

from nanollava.error import Error, printable
from nanollava.files import write_whole
from nanollava.folder import read_json
from nanollava.instruct.contexts import Context
from nanollava.instruct.journal import Journal, ask_all
from nanollava.instruct.messages import KINDS, Prompts, estimate_messages
from nanollava.instruct.plan import Item
from nanollava.instruct.replies import Turn, Unusable, record_of, turns_of
from nanollava.instruct.teacher import Request, Teacher, tokens_in

OF = {name: f"--{name}" for name in ("seed", "teacher", "temperature", "prompts")} | {"input": "captions and boxes"}


class Run:
    """The replies that OUT holds, and what is made of them. To be used by one process at a time.

    Raises Error where the folder belongs to a run with other settings, or cannot be written.
    """

    def __init__(
        self, out: Path, plan: list[Item], prompts: Prompts, contexts: list[Context], teacher: Teacher, seed: int
    ):
        self.out, self.plan, self.prompts, self.teacher, self.seed = out, plan, prompts, teacher, seed
        check_unclaimed(out)
        self.journal = Journal(out / "replies.jsonl")
        settings = {
            "seed": seed,
            "teacher": teacher.name,
            "temperature": teacher.temperature,
            "prompts": prompts.checksum,
            "input": hashlib.sha256(repr(contexts).encode()).hexdigest()[:16],
        }
        check_settings(out / "settings.json", settings)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def ask(self, concurrency: int, again: bool = False) -> int:
        """Ask for all that is missing, with ``again`` also for what was rejected; how many stayed unanswered."""
        attempts = {key: 1 + len(self.journal.replaced[key]) for key in self.results()[1]} if again else {}
        requests = [
            Request(i.key, self.prompts.messages(i.kind, i.context), i.kind, i.context, attempts.get(i.key, 0))
            for i in self.plan
        ]
        try:
            return ask_all(
                requests, self.teacher, self.journal, concurrency, lambda _, reply: reply._asdict(), keep_refused=True
            )
        finally:
            self.write_rejected()

    def results(self) -> tuple[dict[str, list[Turn]], dict[str, str]]:
        """Of the items that are answered, by their keys: the turns of the good ones, the reasons against the others."""
        good, rejected = {}, {}
        for item in self.plan:
            if reply := self.journal.done.get(item.key):
                question = self.chance(item, "question").choice(self.prompts.detail)
                try:
                    if reply.get("refused"):
                        raise Unusable(f"the teacher refuses it: {reply['refused']}")
                    good[item.key] = turns_of(item.kind, str(reply.get("text", "")), bool(reply.get("cut")), question)
                except Unusable as error:
                    rejected[item.key] = str(error)
        return good, rejected

    def chance(self, item: Item, purpose: str) -> random.Random:
        """Draws that depend on nothing but seed and key."""
        return random.Random(f"{self.seed} {item.key} {purpose}")

    def write_rejected(self) -> None:
        done = self.journal.done
        lines = [
            json.dumps({"key": key, "reason": reason, "text": done[key].get("text")}) + "\n"
            for key, reason in self.results()[1].items()
        ]
        write_whole(self.out / "rejected.jsonl", "".join(lines))

    def finish(self, unanswered: int) -> str:
        """Write the records; a summary. Raises Error where there are none."""
        turns, rejected = self.results()
        good = [item for item in self.plan if item.key in turns]
        records = [record_of(i.context, i.kind, turns[i.key], self.chance(i, "image")) for i in good]
        if not records:
            reason = printable(next(iter(rejected.values()), "no request was answered"), 200)
            raise Error(f"{self.out}: no record came out ({reason}); rejected.jsonl there has the replies")
        file = self.out / "instruct.json"
        write_whole(file, "[" + ",\n ".join(map(json.dumps, records)) + "]\n")
        lines = [self.table(turns, rejected), self.tokens()]
        lines.append(f"{file}: {len(records):,} records about {len({i.context.id for i in good}):,} images")
        if rejected:
            lines.append(
                f"rejected: {len(rejected):,}, see {self.out / 'rejected.jsonl'}; --ask-again asks for them anew"
            )
        if unanswered:
            lines.append(f"unanswered: {unanswered:,}; the same command asks for them again")
        return "\n".join(lines)

    def table(self, turns: dict[str, list[Turn]], rejected: dict[str, str]) -> str:
        """For each kind what was planned and what came of it; a turn is a question with its answer (section 4.2)."""
        lines = [f"{'kind':<14}{'planned':>10}{'records':>10}{'rejected':>10}{'mean turns':>12}"]
        for kind in KINDS:
            keys = [item.key for item in self.plan if item.kind == kind]
            lengths = [len(turns[key]) for key in keys if key in turns]
            mean = f"{sum(lengths) / len(lengths):.2f}" if lengths else "-"
            bad = sum(key in rejected for key in keys)
            if keys:
                lines.append(f"{kind:<14}{len(keys):>10,}{len(lengths):>10,}{bad:>10,}{mean:>12}")
        return "\n".join(lines)

    def tokens(self) -> str:
        """What the replies to the plan took, those included that others have replaced."""
        done, replaced = self.journal.done, self.journal.replaced
        replies = [r for i in self.plan if i.key in done for r in (*replaced[i.key], done[i.key])]
        read, written = (
            sum(tokens_in(reply.get(f"{name}_tokens")) for reply in replies) for name in ("prompt", "completion")
        )
        return f"Tokens: {read:,} read and {written:,} written by {self.teacher.name}"


def check_unclaimed(out: Path) -> None:
    """Raises Error for files of a run's names and without its settings: they are another's, and would be replaced."""
    for name in ("replies.jsonl", "rejected.jsonl", "instruct.json"):
        if not os.path.exists(out / "settings.json") and os.path.exists(out / name) and os.path.getsize(out / name):
            problem = f"holds {name}, and no settings.json that tells what it was made with"
            raise Error(f"{out}: {problem}; choose another --out")


def check_settings(file: Path, settings: dict) -> None:
    """Write down what a run is made with. Raises Error where the file has something else."""
    if not os.path.exists(file):
        return write_whole(file, json.dumps(settings, indent=2) + "\n")
    before = read_json(file, "choose another --out")
    for name, value in settings.items():
        if before.get(name) != value:
            other = f"began with another {name}, {printable(str(before.get(name)), 100)} and not {value}"
            raise Error(f"{file.parent}: the run there {other}; give the same {OF[name]}, or choose another --out")


def rehearse(plan: list[Item], prompts: Prompts) -> str:
    """A full prompt of each kind, and what the run would cost in tokens."""
    parts, lines, totals = [], [], Counter()
    for kind in KINDS:
        items = [item for item in plan if item.kind == kind]
        if items:
            prompt = prompts.messages(kind, items[0].context)
            parts += [f"######## {kind}: {items[0].key}", *(f"#### {m['role']}\n{m['content']}" for m in prompt), ""]
            read = sum(estimate_messages(prompts.messages(kind, item.context)) for item in items)
            written = len(items) * prompts.reply_tokens(kind)
            totals.update(requests=len(items), read=read, written=written)
            lines.append(f"{kind:<14}{len(items):>10,}{read:>16,}{written:>16,}")
    head = f"{'kind':<14}{'requests':>10}{'tokens read':>16}{'tokens written':>16}"
    total = f"{'all':<14}{totals['requests']:>10,}{totals['read']:>16,}{totals['written']:>16,}"
    how = "Estimated: a word, up to three digits or any other sign is a token; replies are as long as the examples."
    return "\n".join([*parts, head, *lines, total, how])
