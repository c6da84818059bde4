"""The journal of a long run, and the asking: nothing lost, nothing asked twice, no more at once than allowed."""

import json
import os
import random
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nanollava.error import Error
from nanollava.instruct import journal as module
from nanollava.instruct.journal import Journal, Progress, ask_all
from nanollava.instruct.teacher import Reply, Request, Teacher, Unanswered


def test_what_is_written_is_there_at_once_and_in_the_next_journal(tmp_path):
    file = tmp_path / "deep" / "replies.jsonl"
    with Journal(file) as journal:
        journal.append("a", text="Eins\nzwei \u2028 \u00fc", tokens=3)
        assert json.loads(file.read_text()) == {"key": "a", "text": "Eins\nzwei \u2028 \u00fc", "tokens": 3}
        journal.append("b", text="\ud800")
        assert journal.done == {"a": {"text": "Eins\nzwei \u2028 \u00fc", "tokens": 3}, "b": {"text": "\ud800"}}
    with Journal(file) as again:
        assert again.done == journal.done
        again.append("a", text="anew")
    with Journal(file) as later:
        assert later.done["a"] == {"text": "anew"} and list(later.done) == ["a", "b"]
        assert later.replaced == again.replaced == {"a": [{"text": "Eins\nzwei \u2028 \u00fc", "tokens": 3}]}
    with pytest.raises(ValueError):
        later.append("c")
    assert file.read_text().count("\n") == 3


def test_a_line_cut_at_any_byte_is_dropped_and_the_others_stay(tmp_path):
    whole = b'{"key": "a", "n": 1}\n{"key": "b", "n": 2}\n'
    for length in range(len(whole) + 1):
        file = tmp_path / f"{length}.jsonl"
        file.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        with Journal(file) as journal:
            assert list(journal.done) == ["a", "b"][:lines]
            journal.append("c", n=3)
        assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == [*["a", "b"][:lines], "c"]


def test_what_a_power_cut_leaves_behind_the_last_line_is_dropped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"key": "a"}\n' + bytes(500))
    with Journal(file) as journal:
        assert list(journal.done) == ["a"]
    assert file.read_bytes() == b'{"key": "a"}\n'


@pytest.mark.parametrize("line", ['{"key": "b", "te', "[1]", "{}", '{"key": 3}', "", "\ufffd\ufffd"])
def test_a_line_damaged_elsewhere_is_told_by_its_number(line, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"key": "a"}}\n{line}\n{{"key": "c"}}\n')
    before = file.read_bytes()
    with pytest.raises(Error) as error:
        Journal(file)
    assert str(error.value).startswith(f"{file}, line 2: damaged") and "remove the line" in str(error.value)
    assert file.read_bytes() == before


RECORDS = b'[{"id": "1", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]}]'


@pytest.mark.parametrize(
    "content",
    [RECORDS, RECORDS + b"\n", b'{"question_id": 1, "text": "A."}', b'{"a": 1}\n{"b": 2', b"notes", b"\xff\0\1", b"\n"],
)
def test_a_file_that_is_no_journal_stays_as_it_is(content, tmp_path):
    """Above all records on one line without a line's end, which look like a line that a kill cut short."""
    file = tmp_path / "train.json"
    file.write_bytes(content)
    with pytest.raises(Error, match=r"train.json: is no journal of replies or answers; choose another --out"):
        Journal(file)
    assert file.read_bytes() == content


def test_what_stands_behind_a_journal_and_is_no_beginning_of_a_line_stays(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"key": "a"}\n' + RECORDS)
    with pytest.raises(Error, match="line 2: damaged"):
        Journal(file)
    assert file.read_bytes() == b'{"key": "a"}\n' + RECORDS


def test_many_threads_write_whole_lines(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        work = [threading.Thread(target=lambda n=n: [journal.append(f"{n}-{i}", text="x" * 3000) for i in range(40)])
                for n in range(8)]  # fmt: skip
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    with Journal(tmp_path / "a.jsonl") as again:
        assert again.done == journal.done and len(again.done) == 320


@pytest.mark.parametrize("how", ["refuses", "takes half"])
def test_a_disk_that_is_full_leaves_whole_lines(how, tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.append("a", n=1)
    raw = journal.raw

    class Full:
        closed = False

        def write(self, line: bytes) -> int:
            if how == "refuses":
                raise OSError(28, "No space left on device")
            return raw.write(line[:5])

        def __getattr__(self, name: str):
            return getattr(raw, name)

    journal.raw = Full()
    with pytest.raises(
        Error, match=r"a.jsonl: cannot be written \((No space left|the disk is full).*same command again"
    ):
        journal.append("b", n=2)
    assert journal.file.read_text() == '{"key": "a", "n": 1}\n' and "b" not in journal.done
    journal.raw = raw
    journal.append("b", n=3)
    journal.close()
    with Journal(journal.file) as again:
        assert again.done == {"a": {"n": 1}, "b": {"n": 3}}


def test_a_journal_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="cannot be opened"):
        Journal(tmp_path / "file" / "replies.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Error, match=r"folder: cannot be opened \(Is a directory\)"):
        Journal(tmp_path / "folder")


def test_a_device_or_a_pipe_is_no_place_for_a_journal(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(Error, match="is no ordinary file; choose another name for --out"):
            Journal(file)


# ---------------------------------------------------------------- asking


class Fake(Teacher):
    """Answers after a moment; what a request's kind says may happen instead. It counts."""

    name, at_once = "fake", 100

    def __init__(self, moment: float = 0.0):
        self.moment, self.lock, self.asked = moment, threading.Lock(), []
        self.under_way = self.most = 0

    def ask(self, request: Request) -> Reply:
        with self.lock:
            self.asked.append(request.key)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(self.moment)
        with self.lock:
            self.under_way -= 1
        if request.kind == "unanswered":
            raise Unanswered("500 Internal Server Error, 9 times")
        if request.kind == "refused":
            raise Unanswered("400 Bad Request: too long", for_good=True)
        if request.kind == "fatal":
            raise Error("fake: refuses the key")
        if request.kind == "mistake":
            raise KeyError("a mistake of ours")
        return Reply(request.key.upper(), 10, 2)


def fields(request: Request, reply: Reply) -> dict:
    return {"text": reply.text}


def requests(count: int, kinds: dict[int, str] | None = None) -> list[Request]:
    return [Request(f"k{number}", [], (kinds or {}).get(number, "")) for number in range(count)]


@pytest.mark.parametrize("concurrency", [1, 5])
def test_all_that_is_missing_is_asked_for_once_and_as_many_at_once_as_allowed(concurrency, tmp_path):
    teacher = Fake(0.02)
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append("k3", text="old")
        assert ask_all(requests(20), teacher, journal, concurrency, fields) == 0
        assert journal.done == {f"k{i}": {"text": f"K{i}"} for i in range(20)} | {"k3": {"text": "old"}}
        assert sorted(teacher.asked) == sorted(f"k{i}" for i in range(20) if i != 3)
        assert teacher.most == concurrency
        assert ask_all(requests(20), teacher, journal, concurrency, fields) == 0 and len(teacher.asked) == 19


def test_a_teacher_that_takes_one_at_a_time_gets_one_and_no_thread(tmp_path):
    class Shy(Fake):
        at_once = 1

        def ask(self, request: Request) -> Reply:
            assert threading.current_thread() is threading.main_thread()
            return super().ask(request)

    with Journal(tmp_path / "a.jsonl") as journal:
        assert ask_all(requests(9), Shy(), journal, 8, fields) == 0 and len(journal.done) == 9


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_stays_unanswered_is_told_counted_and_asked_for_in_the_next_run(concurrency, tmp_path, capsys):
    with Journal(tmp_path / "a.jsonl") as journal:
        assert ask_all(requests(20, {2: "unanswered", 9: "unanswered"}), Fake(), journal, concurrency, fields) == 2
        told = capsys.readouterr().err
        assert "unanswered: k2: 500 Internal Server Error, 9 times\n" in told and "18/20" in told
        assert len(journal.done) == 18
        teacher = Fake()
        assert ask_all(requests(20), teacher, journal, concurrency, fields) == 0
        assert sorted(teacher.asked) == ["k2", "k9"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_where_nothing_is_answered_any_more_the_rest_is_not_asked(concurrency, tmp_path, capsys):
    teacher = Fake(0.01)
    with Journal(tmp_path / "a.jsonl") as journal:
        wanted = requests(100, dict.fromkeys(range(5, 100), "unanswered"))
        assert ask_all(wanted, teacher, journal, concurrency, fields) == 95
        assert len(journal.done) == 5 and 15 <= len(teacher.asked) < 90
    told = "10 requests in a row stayed unanswered, the last for: 500 Internal Server Error, 9 times; the rest is not"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("concurrency", [1, 4])
def test_where_nothing_ever_was_answered_the_run_ends(concurrency, tmp_path):
    teacher, told = Fake(0.01), r"10 requests in a row stayed unanswered, the last for: 500 .* same command"
    with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(Error, match=told):
        ask_all(requests(100, dict.fromkeys(range(100), "unanswered")), teacher, journal, concurrency, fields)
    assert 10 <= len(teacher.asked) < 90


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_stays_unanswered_in_every_run_stands_in_no_restart_s_way(concurrency, tmp_path):
    """Twenty of sixty fail whenever they are asked. Runs are stopped at 30 and 50; each goes on behind what came last,
    and comes back to what failed when all else is there."""
    always = dict.fromkeys(range(0, 40, 2), "unanswered")
    for stop in (30, 50):
        with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(Error, match="refuses the key"):
            ask_all(requests(60, always | {stop + 1: "fatal"}), Fake(0.001), journal, concurrency, fields)
        time.sleep(0.05)
    teacher = Fake()
    with Journal(tmp_path / "a.jsonl") as journal:
        ask_all(requests(60, always), teacher, journal, concurrency, fields)
        assert int(teacher.asked[0][1:]) > 40
        assert {f"k{i}" for i in range(55, 60)} <= journal.done.keys()
        for _ in range(50):  # what was under way when a run was stopped may stand among them
            ask_all(requests(60, always), Fake(), journal, concurrency, fields)
        assert sorted(journal.done) == sorted(f"k{i}" for i in range(60) if i not in always)
        assert (
            ask_all(requests(60, always), Fake(), journal, concurrency, fields) == 20
        )  # and ends when only they are left


def test_answers_in_between_let_it_go_on(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        assert ask_all(requests(60, dict.fromkeys(range(0, 60, 2), "unanswered")), Fake(), journal, 1, fields) == 30
        assert len(journal.done) == 30


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("keep", [True, False])
def test_scattered_refusals_stand_in_no_restart_s_way(keep, concurrency, tmp_path, capsys):
    """600 requests, every 20th refused for good; stopped after 400. Kept or not, what comes is what an undisturbed run
    leaves; kept, none is asked for again."""
    kinds, first = dict.fromkeys(range(0, 600, 20), "refused"), dict.fromkeys(range(400, 600), "fatal")
    finish = lambda _, reply: {"text": reply.text} | ({"refused": reply.refused} if reply.refused else {})  # noqa: E731
    with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(Error, match="refuses the key"):
        ask_all(requests(600, kinds | first), Fake(), journal, concurrency, finish, keep_refused=keep)
    time.sleep(0.1)
    teacher = Fake()
    with Journal(tmp_path / "a.jsonl") as journal:
        before = len(journal.done)
        assert before > (390 if keep else 370)
        missing = ask_all(requests(600, kinds), teacher, journal, concurrency, finish, keep_refused=keep)
        assert len(teacher.asked) == 600 - before and missing == (0 if keep else 30)
        refused = {"text": "", "refused": "400 Bad Request: too long"}
        expected = {f"k{i}": refused if i in kinds else {"text": f"K{i}"} for i in range(600)}
        assert journal.done == {k: v for k, v in expected.items() if keep or v is not refused}
    assert "refused: k420: 400 Bad Request: too long\n" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [True, False])
def test_where_everything_is_refused_the_run_ends(keep, tmp_path):
    """A setting that the teacher does not take, for example: what it asks for is not all written off."""
    teacher = Fake()
    with Journal(tmp_path / "a.jsonl") as journal:
        for _ in range(2):
            with pytest.raises(Error, match=r"10 requests in a row stayed unanswered, the last for: 400"):
                wanted = requests(100, dict.fromkeys(range(100), "refused"))
                ask_all(wanted, teacher, journal, 1, lambda _, reply: reply._asdict(), keep_refused=keep)
    assert len(teacher.asked) == 20


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(("kind", "error"), [("fatal", Error), ("mistake", KeyError)])
def test_what_no_repetition_mends_ends_the_run_and_keeps_what_was_answered(kind, error, concurrency, tmp_path):
    teacher = Fake(0.005)
    with Journal(tmp_path / "a.jsonl") as journal:
        with pytest.raises(error):
            ask_all(requests(100, {30: kind}), teacher, journal, concurrency, fields)
        assert 30 - concurrency < len(journal.done) < 50
        answered = len(journal.done)
    time.sleep(0.1)  # what was under way ends, and is not written behind the end of the run
    with Journal(tmp_path / "a.jsonl") as again:
        assert answered <= len(again.done) < answered + concurrency


def test_ctrl_c_keeps_what_was_answered_and_waits_for_nobody(tmp_path, heeding_ctrl_c):
    class Interrupted(Fake):
        def ask(self, request: Request) -> Reply:
            if request.key == "k5":
                while len(journal.done) < 29 and time.monotonic() - started < 20:
                    time.sleep(0.01)
                signal_main()
                time.sleep(60)
            return super().ask(request)

    def signal_main() -> None:
        import _thread

        _thread.interrupt_main()

    started = time.monotonic()
    with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(KeyboardInterrupt):
        ask_all(requests(30), Interrupted(0.001), journal, 3, fields)
    assert time.monotonic() - started < 30 and len(journal.done) == 29


def test_the_progress_line_has_rate_tokens_and_time_left(tmp_path, monkeypatch):
    """10 of 100 were there before; 30 more in 60 seconds: half a reply a second, 60 to go, so 2 minutes."""
    teacher = Fake()
    progress = Progress(100, 90, teacher)
    assert "time left not known yet" in progress.line(0.0)
    for _ in range(30):
        progress.count(Reply("", 1000, 50))
    assert progress.line(60.0) == "40/100  0.5 replies/s  30,000 tokens read, 1,500 written  2:00 left"
    teacher.trouble = "429 Too Many Requests"
    assert progress.line(60.0).endswith("2:00 left  (repeating: 429 Too Many Requests)")


def test_on_a_terminal_the_line_is_rewritten_elsewhere_it_comes_every_ten_seconds(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    for terminal, expected in ((False, 3), (True, 31)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        progress = Progress(40, 40, Fake())
        for _ in range(30):
            clock[0] += 1
            progress.count(Reply("", 1, 1))
            progress.show()
        progress.end()
        told = capsys.readouterr().err
        assert told.count("\r") == (31 if terminal else 0) and told.count("40  ") == expected + (not terminal)
        assert told.endswith("\n") and "30/40" in told


@pytest.mark.parametrize("last", ["fatal", "interrupted", ""])
def test_on_a_terminal_what_is_said_stands_below_the_progress_line(last, tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    class Timed(Fake):
        def ask(self, request: Request) -> Reply:
            clock[0] += 1
            if request.kind == "interrupted":
                raise KeyboardInterrupt
            return super().ask(request)

    with Journal(tmp_path / "a.jsonl") as journal, suppress(Error, KeyboardInterrupt):
        ask_all(requests(9, {3: "unanswered", 4: "unanswered", 8: last}), Timed(), journal, 1, fields)
    lines = capsys.readouterr().err.split("\n")
    assert [line for line in lines if line.startswith("unanswered: ")] == [
        f"unanswered: k{number}: 500 Internal Server Error, 9 times" for number in (3, 4)
    ]
    assert (lines[-1] == "") == (last != "interrupted") and not any(line == "" for line in lines[:-1])


def test_random_requests_in_random_order_come_out_the_same(tmp_path):
    """Against brute force: whatever was done before, in the end each key has its own reply."""
    rng = random.Random(1)
    for number in range(20):
        with Journal(Path(tmp_path / f"{number}.jsonl")) as journal:
            wanted = rng.sample(requests(30), rng.randint(1, 30))
            for request in rng.sample(wanted, len(wanted) // 2):
                journal.append(request.key, text=request.key.upper())
            assert ask_all(wanted, Fake(), journal, rng.randint(1, 9), fields) == 0
            assert journal.done == {request.key: {"text": request.key.upper()} for request in wanted}
