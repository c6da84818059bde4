"""Data generation over HTTP, through the openai library: a server that misbehaves, kills, Ctrl-C, the key."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from nanollava.error import Error
from nanollava.instruct import __main__ as command
from nanollava.instruct.contexts import read_lines
from nanollava.instruct.endpoint import EndpointTeacher, is_local, read_key, seconds_to_wait
from nanollava.instruct.messages import FOLDER, KINDS, read_prompts
from nanollava.instruct.plan import make_plan
from nanollava.instruct.teacher import Request, Unanswered
from nanollava.llava import LlavaConfig
from nanollava.tokenizer import Tokenizer
from nanollava.train.check import main as check
from nanollava.train.records import read_records
from tests.teacher_server import KEY, TeacherServer, converse

pytest.importorskip("openai", reason='the library for endpoints: pip install ".[teacher]"')

ROOT = Path(__file__).parents[2]
KILLED = """
import os, random, sys, time
import openai, openai.resources.chat.completions  # once, and not in each of those that are killed
from nanollava.instruct import __main__ as command
from nanollava.instruct import endpoint
words, seed, log, journal = sys.argv[1:-3], int(sys.argv[-3]), sys.argv[-2], sys.argv[-1]
chance, lines = random.Random(seed), lambda: open(journal, "rb").read().count(b"\\n")
for attempt in range(20):
    more = chance.randint(0, 9)  # none: killed while it starts
    wanted = lines() + more
    child = os.fork()
    if not child:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os._exit(command.main(words))
    while more and lines() < wanted and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.05 if more else 0.2))
    os.kill(child, 9)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


ENDED = """
import os, sys
from pathlib import Path
from nanollava.instruct import __main__ as command, run
words, left, finish = sys.argv[1:-1], int(sys.argv[-1]), run.Run.finish
def watch(place, name):
    function = getattr(place, name)
    def watched(*given, **named):
        global left
        if not left:
            os.kill(os.getpid(), 9)
        left -= 1
        return function(*given, **named)
    setattr(place, name, watched)
def finish_watched(self, unanswered):  # killed as it opens the file, flushes it, renames it, and when it is there
    for place, name in ((Path, "open"), (os, "fsync"), (Path, "replace"), (run.Run, "table")):
        watch(place, name)
    return finish(self, unanswered)
run.Run.finish = finish_watched
command.main(words)
"""


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def contexts(tmp_path) -> Path:
    """30 images in words."""
    file = tmp_path / "contexts.jsonl"
    lines = [
        {"id": f"{number:012d}", "image": f"{number}.png", "captions": [f"Picture {number}.", f"A {number}."],
         "instances": [{"category": "cup", "bbox": [0.1, 0.2, 0.3, 0.4]}]}
        for number in range(1, 31)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def run(server: TeacherServer, contexts: Path, out: Path, *words: object) -> int:
    """The exit status of a run against the server; repetitions come fast."""
    return command.main(words_for(server, contexts, out, *words))


def words_for(server: TeacherServer, contexts: Path, out: Path, *words: object) -> list[str]:
    teacher = ("--teacher", "endpoint", "--teacher-model", "loopback", "--base-url", server.url)
    return [str(word) for word in ("--contexts", contexts, "--out", out, *teacher, "--retry-pause", 0.01, *words)]


def asks(contexts: Path, records: int | None = None) -> dict[str, str]:
    """Each item's key by the JSON of what is asked for it."""
    prompts, plan = read_prompts(FOLDER), make_plan(read_lines(contexts), list(KINDS), records, 0)
    return {json.dumps(prompts.messages(item.kind, item.context)): item.key for item in plan}


def records_of(out: Path) -> list[dict]:
    return json.loads((out / "instruct.json").read_text())


def teacher_at(server: TeacherServer, **settings: object) -> EndpointTeacher:
    return EndpointTeacher("loopback", server.url, **({"pause": 0.01} | settings))


ASKED = Request("k", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A.\nB."}], "conversation")


# ---------------------------------------------------------------- all contexts, all that can go wrong

TROUBLE = ("answer", "delay 0.02", "drop", "429", "429 0", "500", "503", "cut JSON", "half", "page", "nothing")


def test_all_contexts_of_the_benchmark_through_a_server_that_misbehaves(
    fixtures, tiny_tokenizer_file, tmp_path, capsys
):
    """Each request meets up to three mishaps, drawn by what is asked; in the end all records are good."""
    contexts = fixtures / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl"
    met = Counter()

    def script(messages: list[dict], before: int) -> str:
        action = random.Random(f"{messages} {before}").choice(TROUBLE) if before < 3 else "answer"
        met[action] += 1
        return action

    with TeacherServer(script=script) as server:
        assert run(server, contexts, tmp_path / "out", "--concurrency", 16) == 0
    assert set(met) == set(TROUBLE)
    told = capsys.readouterr().out
    assert "165 records about 80 images" in told and "rejected:" not in told
    records, keys = records_of(tmp_path / "out"), asks(contexts)
    assert [f"{record['id']}-{record['kind']}" for record in records] == list(keys.values())
    for record, messages in zip(records, keys, strict=True):
        turns = [turn["value"].replace("<image>\n", "").replace("\n<image>", "") for turn in record["conversations"]]
        reply = converse(json.loads(messages))
        assert all(turn in reply for turn in (turns[1:] if record["kind"] == "detail" else turns))
    for record in records:
        Image.new("RGB", (8, 8)).save(tmp_path / record["image"])
    tokenizer = Tokenizer(tiny_tokenizer_file)
    examples, report = read_records(tmp_path / "out/instruct.json", tmp_path, tokenizer, LlavaConfig(), "vicuna_v1")
    assert len(examples) == 165 and not report.findings
    assert check(["check", str(tmp_path / "out/instruct.json"), "--images", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/replies.jsonl").read_text().splitlines()]
    read = sum(len(m["content"].split()) for messages in keys for m in json.loads(messages))
    assert sum(line["prompt_tokens"] for line in lines) == read and f"Tokens: {read:,} read" in told


@pytest.mark.parametrize("action", [*TROUBLE[2:], "408", "409", "deep", "parts"])
def test_what_a_repetition_may_mend_is_repeated(action):
    with TeacherServer(script=lambda messages, before: action if before < 2 else "answer") as server:
        reply = teacher_at(server).ask(ASKED)
        assert reply.text == converse(ASKED.messages) and (reply.prompt_tokens, reply.cut) == (4, False)
        assert list(server.asked.values()) == [3]


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("500", "500 Internal Server Error, 4 times"),
        ("429", "429 Too Many Requests, 4 times"),
        ("drop", r"no connection, or it broke \(.+\), 4 times"),
        ("cut JSON", "the answer was cut off or not in the chat-completions format, 4 times"),
        ("429 5000", "429 Too Many Requests, to be asked in 5000 s"),
        ("400", "400 Bad Request: .*Refused on purpose"),
    ],
)
def test_what_stays_wrong_is_unanswered_with_the_reason(action, reason):
    with TeacherServer(script=lambda messages, before: action) as server:
        with pytest.raises(Unanswered, match=reason):
            teacher_at(server, retries=3).ask(ASKED)
        assert list(server.asked.values()) == [1 if action in ("400", "429 5000") else 4]


def test_a_server_that_is_slow_or_gone_is_not_waited_for_without_end():
    with TeacherServer(script=lambda messages, before: "delay 30" if before < 1 else "answer") as server:
        started = time.monotonic()
        assert teacher_at(server, timeout=0.5).ask(ASKED).text == converse(ASKED.messages)
        assert time.monotonic() - started < 20
    with pytest.raises(Unanswered, match=r"no connection.*, 2 times"):
        teacher_at(server, retries=1).ask(ASKED)


def test_retry_after_is_obeyed_and_other_pauses_double():
    with TeacherServer(script=lambda messages, before: "429 0.6" if before < 2 else "answer") as server:
        teacher_at(server).ask(ASKED)
        assert all(later - earlier >= 0.6 for earlier, later in pairwise(server.times)) and len(server.times) == 3
    teacher = teacher_at(server, pause=1.0)
    for attempt, most in ((1, 1.0), (2, 2.0), (3, 4.0), (7, 60.0), (70, 60.0), (5000, 60.0)):
        pauses = [teacher.pause_before(attempt, None) for _ in range(200)]
        assert most / 2 <= min(pauses) < 0.6 * most and 0.9 * most < max(pauses) <= most
    pauses = [teacher.pause_before(1, 7.0) for _ in range(200)]
    assert 7.0 <= min(pauses) < max(pauses) <= 8.0


def test_retry_after_is_read_in_seconds_and_as_a_date():
    from email.utils import formatdate

    assert seconds_to_wait({"retry-after": "2.5"}) == 2.5
    assert 28 < seconds_to_wait({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert seconds_to_wait({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0
    assert all(seconds_to_wait({"retry-after": value} if value else {}) is None for value in ("", "soon", "nan"))


def test_tokens_that_are_no_numbers_are_not_counted(contexts, tmp_path, capsys):
    with TeacherServer(script=lambda messages, before: "words") as server:
        assert run(server, contexts, tmp_path / "out", "--records", 5) == 0
    assert "Tokens: 0 read and 0 written" in capsys.readouterr().out


def test_what_fails_in_every_run_keeps_no_records_back(contexts, tmp_path, capsys):
    """Twenty of 60 requests get nothing but 500: the others come, become records, and stay when all is asked again."""
    broken = {key for key in asks(contexts, 60).values() if int(key[:12]) % 3 == 0}
    keys = asks(contexts, 60)
    with TeacherServer(
        script=lambda messages, _: "500" if keys[json.dumps(messages)] in broken else "answer"
    ) as server:
        words = ("--records", 60, "--retries", 0, "--concurrency", 1)
        for _ in range(3):
            assert run(server, contexts, tmp_path / "out", *words) == 1
            assert f"unanswered: {len(broken)};" in capsys.readouterr().out
            assert len(records_of(tmp_path / "out")) == 60 - len(broken)
    assert len(broken) > 10


@pytest.mark.parametrize(
    ("url", "proxy"), [("http://x..\u00e9/v1", ""), ("http://localhost:1/v1", "gopher://user:secret@localhost:1")]
)
def test_an_address_or_a_proxy_that_cannot_be_used_is_one_line(url, proxy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(Error, match=r"--base-url m at .*: cannot be used") as error:
        EndpointTeacher("m", url)
    assert KEY not in str(error.value) and "secret" not in str(error.value)


def test_options_go_with_the_request_and_newer_models_get_the_newer_name():
    with TeacherServer(
        script=lambda messages, before: "400 max_completion_tokens" if before < 1 else "answer"
    ) as server:
        teacher = teacher_at(server, temperature=0.2, max_tokens=77, retries=0)
        assert teacher.ask(ASKED).text and teacher.ask(ASKED).text
    expected = {"model": "loopback", "messages": ASKED.messages, "temperature": 0.2}
    assert server.bodies == [expected | {"max_tokens": 77}] + [expected | {"max_completion_tokens": 77}] * 2
    with TeacherServer() as server:
        teacher_at(server).ask(ASKED)
    assert server.bodies == [{"model": "loopback", "messages": ASKED.messages, "max_tokens": 1024}]


def test_as_many_requests_at_once_as_allowed_and_never_more(contexts, tmp_path):
    with TeacherServer(script=lambda messages, before: "delay 0.3") as server:
        assert run(server, contexts, tmp_path / "out", "--concurrency", 7) == 0
    assert server.at_once == 7 and set(server.asked.values()) == {1}


# ---------------------------------------------------------------- replies that are no records


def test_replies_that_cannot_be_parsed_are_kept_counted_and_asked_again(contexts, tmp_path, capsys):
    actions = {"1.": "empty", "2.": "separators", "3.": "length", "4.": "content_filter"}
    reasons = {"1.": "it is empty", "2.": "wrong separators", "3.": "it was cut off: ask again with more --max-tokens",
               "4.": "the teacher refuses it: the endpoint's content filter held it back"}  # fmt: skip
    words = ("--kinds", "conversation")

    def script(messages: list[dict], before: int) -> str:
        return actions.get(messages[-1]["content"].split("\n")[0].removeprefix("Picture "), "answer")

    with TeacherServer(script=script) as server:
        assert run(server, contexts, tmp_path / "out", *words) == 0
        told = capsys.readouterr().out
        assert re.search(r"conversation +30 +26 +4 +2\.00\n", told) and "rejected: 4, see" in told
        lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
        found = {f"{int(line['key'].partition('-')[0])}.": line["reason"] for line in lines}
        assert set(found) == set(reasons) and all(found[name].startswith(reasons[name]) for name in reasons)
        assert run(server, contexts, tmp_path / "out", *words) == 0 and sum(server.asked.values()) == 30
        actions.clear()
        assert run(server, contexts, tmp_path / "out", *words, "--ask-again") == 0 and sum(server.asked.values()) == 34
        assert run(server, contexts, tmp_path / "fresh", *words) == 0
    assert len(records_of(tmp_path / "out")) == 30
    assert (tmp_path / "out/instruct.json").read_bytes() == (tmp_path / "fresh/instruct.json").read_bytes()


def test_some_that_stay_unanswered_are_told_with_status_1_and_asked_in_the_next_run(contexts, tmp_path, capsys):
    broken = ["500"]

    def script(messages: list[dict], before: int) -> str:
        return broken[0] if messages[-1]["content"].startswith("Picture 7.") else "answer"

    with TeacherServer(script=script) as server:
        assert run(server, contexts, tmp_path / "out", "--retries", 1) == 1
        told = capsys.readouterr()
        number = int(re.search(r"unanswered: (\d), the same command", told.out.replace(";", ","))[1])
        assert told.err.count("unanswered: 000000000007-") == number >= 1
        assert len(records_of(tmp_path / "out")) == 62 - number
        broken[0] = "answer"
        assert run(server, contexts, tmp_path / "out", "--retries", 1) == 0
        assert run(server, contexts, tmp_path / "fresh") == 0
    assert (tmp_path / "out/instruct.json").read_bytes() == (tmp_path / "fresh/instruct.json").read_bytes()


def test_what_is_refused_for_good_is_rejected_with_the_reason_and_stands_in_no_way(contexts, tmp_path, capsys):
    """The restart after a kill has all earlier refusals at its head, more than it takes to give up."""
    refusing = ["400"]

    def script(messages: list[dict], before: int) -> str:
        if messages[-1]["content"].split("\n")[0][-2:] in ("2.", "5.", "8.") and refusing:
            return refusing[0]
        return "401" if len(server.asked) > most[0] else "answer"

    most = [50]
    with TeacherServer(script=script) as server:
        assert run(server, contexts, tmp_path / "out", "--concurrency", 1) == 2
        most[0] = 1000
        assert run(server, contexts, tmp_path / "out", "--concurrency", 1) == 0
        told = capsys.readouterr()
        lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
        assert len(lines) > 10 and f"rejected: {len(lines)}, see" in told.out and "unanswered:" not in told.out
        assert all(line["reason"].startswith("the teacher refuses it: 400 Bad Request") for line in lines)
        assert KEY not in (tmp_path / "out/rejected.jsonl").read_text() + told.err
        asked = sum(server.asked.values())
        assert run(server, contexts, tmp_path / "out") == 0 and sum(server.asked.values()) == asked
        assert run(server, contexts, tmp_path / "fresh") == 0
        assert (tmp_path / "out/instruct.json").read_bytes() == (tmp_path / "fresh/instruct.json").read_bytes()
        refusing.clear()
        assert run(server, contexts, tmp_path / "out", "--ask-again") == 0
    assert len(records_of(tmp_path / "out")) == 62


# ---------------------------------------------------------------- what no repetition mends, and the key


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("401", r"loopback at 127.0.0.1:\d+: refuses the key \(401 Unauthorized\); set OPENAI_API_KEY"),
        ("403", r"loopback at 127.0.0.1:\d+: refuses the key \(403 Forbidden\)"),
        ("404", "404 Not Found: .*check --teacher-model and --base-url"),
        ("429 insufficient_quota", "429 Too Many Requests, no quota is left"),
    ],
)
def test_a_wrong_key_or_model_ends_the_run_with_one_line_and_nothing_lost(action, words, contexts, tmp_path, capsys):
    wrong = [False]

    def script(messages: list[dict], before: int) -> str:
        wrong[0] |= sum(server.asked.values()) > 20
        return action if wrong[0] else "answer"

    with TeacherServer(script=script) as server:
        assert run(server, contexts, tmp_path / "out", "--concurrency", 1) == 2
        told = capsys.readouterr()
        errors = [line for line in told.err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and re.search(words, errors[0]), told.err
        assert "Traceback" not in told.err and KEY not in told.err + told.out
        assert len((tmp_path / "out/replies.jsonl").read_text().splitlines()) == 20
        script_over = server.script
        server.script = lambda messages, before: "answer"
        assert script_over and run(server, contexts, tmp_path / "out") == 0
        assert Counter(server.asked.values()) == {1: 61, 2: 1}


@pytest.mark.parametrize("actions", [["echo"], ["500", "400", "echo"], ["401"], ["404"], ["429 insufficient_quota"]])
def test_the_key_goes_to_the_endpoint_and_nowhere_else(actions, contexts, tmp_path, capsys):
    """Whatever the endpoint says of it."""

    def script(messages: list[dict], before: int) -> str:
        return random.Random(f"{messages} {before}").choice(actions)

    with TeacherServer(script=script) as server:
        run(server, contexts, tmp_path / "out", "--retries", 1)
    assert server.keys == {f"Bearer {KEY}"}
    told = capsys.readouterr()
    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert written and KEY not in told.out + told.err + written
    if "echo" in actions:
        assert "Bearer [key]" in written


@pytest.mark.parametrize(
    ("url", "value", "words"),
    [
        ("https://api.openai.com/v1", None, "OPENAI_API_KEY is not set: api.openai.com needs a key"),
        ("https://api.openai.com/v1", "  ", "OPENAI_API_KEY is not set"),
        ("https://api.openai.com/v1", "sk-a\nb", "OPENAI_API_KEY: holds spaces or signs that no key has"),
        ("https://api.openai.com/v1", "sk-\u00e9", "OPENAI_API_KEY: holds spaces or signs that no key has"),
        ("localhost:8000", "sk-a", "--base-url localhost:8000: give one like http"),
        ("http://[::1", "sk-a", "--base-url"),
        ("http://localhost:none/v1", "sk-a", "--base-url"),
        ("http://a b/v1", "sk-a", "--base-url http://a b/v1: give one like http"),
        ("http://localhost:1/v1\n", "sk-a", "--base-url http://localhost:1/v1\\n: give one like http"),
    ],
)
def test_a_key_that_cannot_be_one_and_addresses_that_are_none(url, value, words, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY") if value is None else monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(Error) as error:
        read_key(url)
    assert words in str(error.value) and (not value or value not in str(error.value))


def test_a_local_endpoint_needs_no_key_and_no_secret_is_in_its_name(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with TeacherServer() as server:
        teacher = teacher_at(server)
        assert teacher.ask(ASKED).text and server.keys == {"Bearer none"}
    assert all(map(is_local, ("localhost", "127.0.0.1", "::1", "10.0.0.3", "192.168.1.7", "gpu.local")))
    assert not any(map(is_local, ("api.openai.com", "8.8.8.8", "localhost.example.com")))
    named = EndpointTeacher("m", "http://user:secret@localhost:1/v1")
    assert named.name == "m at localhost:1"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert EndpointTeacher("m", "https://api.openai.com/v1").name == "m at api.openai.com"


def test_one_folder_takes_no_replies_of_another_temperature_or_endpoint(contexts, tmp_path, capsys):
    words = ("--records", 4, "--temperature", 0.5)
    with TeacherServer() as server, TeacherServer() as other:
        assert run(server, contexts, tmp_path / "out", *words) == 0
        before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        for problem, there, more in (
            ("another temperature, 0.5 and not 0.7; give the same --temperature", server, (0.7,)),
            ("another temperature, 0.5 and not None", server, ("default",)),
            (f"another teacher, loopback at 127.0.0.1:{server.server_port} and not", other, (0.5,)),
        ):
            assert run(there, contexts, tmp_path / "out", *words, "--temperature", *more) == 2
            assert problem in capsys.readouterr().err
        assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        assert sum(server.asked.values()) == 4 and not other.asked


# ---------------------------------------------------------------- kills and Ctrl-C


@pytest.fixture
def watched():
    """A server that notes every request for what had been written before it came: ``watched.again``."""

    def before(messages: list[dict]) -> None:
        name = server.names[json.dumps(messages)]
        written = server.journal.read_bytes() if server.journal else b""
        server.again += [name] if f'{{"key": "{name}", '.encode() in written[: written.rfind(b"\n") + 1] else []

    with TeacherServer(before=before, script=lambda messages, times: "delay 0.06") as server:
        server.again, server.journal = [], None
        yield server


def test_twenty_kills_at_random_moments_change_nothing(watched, contexts, tmp_path):
    """Killed twenty times while it starts, asks and writes, then at each step of the end; then it runs to its end. The
    file is that of a run that nobody disturbed, no journal line is lost or there twice, and nothing is asked for again
    once its line is written."""
    lines = [json.loads(contexts.read_text().splitlines()[0]) | {"id": f"{n:012d}", "captions": [f"Picture {n}.", "A."]}
             for n in range(1, 121)]  # fmt: skip
    contexts.write_text("\n".join(map(json.dumps, lines)))
    watched.names = asks(contexts)
    assert run(watched, contexts, tmp_path / "whole", "--concurrency", 60) == 0
    out, log, seed = tmp_path / "out", tmp_path / "log", random.SystemRandom().randrange(10**6)
    watched.journal = out / "replies.jsonl"
    watched.journal.parent.mkdir()
    watched.journal.touch()
    words = words_for(watched, contexts, out, "--concurrency", 4)
    line = [sys.executable, "-c", KILLED, *words, str(seed), str(log), str(watched.journal)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    told = f"seed {seed}: {done.stdout} {done.stderr} {log.read_text()}"
    assert done.returncode == 0 and done.stdout.count("status 9\n") == 20, told
    written = len(out.joinpath("replies.jsonl").read_bytes().split(b"\n")) - 1
    assert 20 < written < len(watched.names), told  # the kills did come in the middle of the work
    assert not (out / "instruct.json").exists() and "error" not in log.read_text(), told
    whole = (tmp_path / "whole/instruct.json").read_bytes()
    for last in range(4):
        line = [sys.executable, "-c", ENDED, *words_for(watched, contexts, out, "--concurrency", 60), str(last)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, f"{last}: {done.stdout} {done.stderr}"
        there = out.joinpath("instruct.json")
        assert there.read_bytes() == whole if last == 3 else not there.exists(), last
    assert run(watched, contexts, out, "--concurrency", 60) == 0
    assert not list(out.glob(".*.saving"))
    keys = [json.loads(text)["key"] for text in (out / "replies.jsonl").read_text().splitlines()]
    assert sorted(keys) == sorted(watched.names.values()), told
    assert watched.again == [], told
    for name in ("instruct.json", "rejected.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), told


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(watched, contexts, tmp_path):
    watched.names = asks(contexts)
    assert run(watched, contexts, tmp_path / "whole", "--concurrency", 60) == 0
    before, out = sum(watched.asked.values()), tmp_path / "out"
    line = [sys.executable, "-m", "nanollava.instruct", *words_for(watched, contexts, out, "--concurrency", 2)]
    deaf = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=deaf)  # fmt: skip
    started = time.monotonic()
    while sum(watched.asked.values()) < before + 8 and time.monotonic() - started < 120:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in told and "the same command goes on" in told, told
    written = len((out / "replies.jsonl").read_text().splitlines())
    assert 5 <= written < 62 and not (out / "instruct.json").exists()
    watched.journal = out / "replies.jsonl"
    assert run(watched, contexts, out, "--concurrency", 60) == 0
    assert watched.again == [] and sum(watched.asked.values()) <= before + 62 + 2
    assert (out / "instruct.json").read_bytes() == (tmp_path / "whole/instruct.json").read_bytes()
    assert os.listdir(tmp_path).count(".out.lock") == 0
