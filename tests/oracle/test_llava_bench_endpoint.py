"""LLaVA-Bench judged by a server on loopback, through the library for endpoints: from the published questions and a
model's answers to the table, over a network that fails now and then."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.teacher_server import KEY, TeacherServer
from tests.test_llava_bench import check_published_table, judge_published, read_lines, scores_by_length

pytest.importorskip("openai", reason='the library for endpoints: pip install ".[teacher]"')


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def reference_in(messages: list[dict]) -> str:
    return messages[-1]["content"].partition("[Assistant 1]\n")[2].partition("\n\n[End of Assistant 1]")[0]


def review(messages: list[dict]) -> str:
    """What the judge says of the answers that it is shown."""
    return "{}, {} \nReasons.".format(*scores_by_length(reference_in(messages)))


@pytest.fixture
def judge(published, fixtures, tmp_path) -> Callable[..., int]:
    """A function (server, *options) -> exit status, that writes reviews.jsonl."""

    def judge(server: TeacherServer, *options: str) -> int:
        words = [f"--base-url={server.url}", "--teacher-model=gpt-4", "--retry-pause=0.01", *options]
        return judge_published(published, fixtures, tmp_path / "reviews.jsonl", *words)

    return judge


@pytest.fixture
def check(published, fixtures) -> Callable[[str], None]:
    """A function that compares the printed table with sums by hand."""
    told = read_lines(fixtures / "llava_bench_coco" / "qa90_gpt4_answer.jsonl")
    references = {row["question_id"]: row["text"] for row in told}
    return lambda output: check_published_table(output, read_lines(published / "questions.jsonl"), references)


def reviews(folder: Path) -> list[dict]:
    return sorted(read_lines(folder / "reviews.jsonl"), key=lambda row: row["question_id"])


def test_a_network_that_fails_now_and_then(judge, check, tmp_path, capsys):
    def trouble(messages: list[dict], before: int) -> str:
        kinds = ("answer", "answer", "delay 0.05", "drop", "429 0", "500", "cut JSON", "half")
        return "answer" if before else kinds[len(messages[-1]["content"]) % len(kinds)]

    with TeacherServer(review, trouble) as server:
        assert judge(server, "--concurrency=4") == 0
        output, errors = capsys.readouterr()
        check(output)
        assert len(server.asked) == 90 < sum(server.asked.values())
        assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0.2, 1024)}
        assert judge(server) == 0 and capsys.readouterr().out == output
        assert max(server.asked.values()) == 2  # the second run asked for nothing
    assert KEY not in (tmp_path / "reviews.jsonl").read_text() + output + errors


def test_a_judge_may_be_left_its_own_temperature(judge, tmp_path):
    """Some endpoints refuse every request that names another one."""
    with TeacherServer(review) as server:
        server.script = lambda messages, before: "400" if "temperature" in server.bodies[-1] else "answer"
        assert judge(server, "--temperature=default", "--concurrency=1") == 0
        assert {"temperature" in body for body in server.bodies} == {False} and len(reviews(tmp_path)) == 90


def test_reviews_that_never_come_are_said_and_come_with_the_next_run(judge, check, tmp_path, capsys):
    def trouble(messages: list[dict], before: int) -> str:
        return "500" if len(reference_in(messages)) % 9 == 0 else "answer"

    with TeacherServer(review, trouble) as server:
        assert judge(server, "--retries=0") == 1
        output, errors = capsys.readouterr()
        missing = 90 - len(reviews(tmp_path))
        assert 0 < missing < 90 and output == ""
        assert f"{missing} of 90 have no reply yet; the same command asks for them" in errors.splitlines()[-1]
        server.script = lambda messages, before: "answer"
        assert judge(server) == 0
        check(capsys.readouterr().out)
        assert sum(server.asked.values()) == 90 + missing


def test_a_refused_key_is_one_line_and_loses_nothing(judge, check, tmp_path, capsys):
    with TeacherServer(review, lambda messages, before: "401" if len(server.asked) > 20 else "answer") as server:
        assert judge(server, "--concurrency=1") == 2
        errors = capsys.readouterr().err.splitlines()
        assert "refuses the key" in errors[-1] and KEY not in "".join(errors) and len(reviews(tmp_path)) == 20
        server.script = lambda messages, before: "answer"
        assert judge(server) == 0
        check(capsys.readouterr().out)


def test_a_judge_that_never_gives_scores(judge, tmp_path, capsys):
    with TeacherServer(lambda messages: "As a language model, I cannot compare.") as server:
        assert judge(server) == 2
    output, errors = capsys.readouterr()
    assert "| miniature | - | - | - | - |" in output
    assert "none of the 90 reviews has scores" in errors.splitlines()[-1]
    assert [row["tuple"] for row in reviews(tmp_path)] == [[-1, -1]] * 90
