"""LLaVA-Bench: scores by hand, the judge's text to the letter, files matched by id, runs that were stopped, and the
whole way from the published questions to the table."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanollava.error import Error
from nanollava.evaluate import replies
from nanollava.evaluate.__main__ import main
from nanollava.evaluate.llava_bench import find_image, parse_scores, relative_score
from nanollava.instruct.teacher import Reply, Request, Teacher, Unanswered
from nanollava.miniature.scenes import draw, random_scene
from nanollava.train.keep import alone

MINIATURE = Path(__file__).parents[1] / "weights" / "miniature"


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Judge(Teacher):
    """Replies with what ``says`` makes of a request, and keeps what it was asked."""

    name = "a judge on the bench"

    def __init__(self, says: Callable[[Request], str]):
        self.says, self.asked = says, []

    def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        return Reply(self.says(request), 100, 10)


@pytest.fixture
def appoint(monkeypatch) -> Callable[[Callable], Judge]:
    """Have every command ask a Judge who says what the function makes of a request."""

    def appoint(says: Callable[[Request], str]) -> Judge:
        judge = Judge(says)
        monkeypatch.setattr(replies, "open_teacher", lambda args: judge)
        return judge

    return appoint


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        ("8 7", (8, 7), True),
        ("8 7\nBoth are good, 9 10.", (8, 7), True),
        ("8,7\nBoth", (8, 7), True),
        ("8.5 7.25", (8.5, 7.25), True),
        ("8, 7\nBoth", (8, 7), False),
        ("8 7 \nBoth", (8, 7), False),
        (" 8 7", (8, 7), False),
        ("8  7", (8, 7), False),
        ("8\t7", (8, 7), False),
        ("8 7\r\nBoth", (8, 7), True),  # float forgives the \r
        ("", None, True),
        ("\n8 7", None, True),
        ("8", None, True),
        ("8 7 6", None, True),
        ("Assistant 1: 8, Assistant 2: 7", None, True),
        ("8/10 7/10", None, True),
        ("eight seven", None, True),
        ("nan 7", None, True),
        ("8 inf", None, True),
    ],
)
def test_scores_of_a_review_by_hand(text, lenient, strict):
    assert parse_scores(text) == lenient
    assert parse_scores(text, strict=True) == (lenient if strict else None)


def test_strict_parsing_is_the_official_rule_on_random_lines():
    """An oracle written from the rule's words: first line, commas become spaces, single spaces, exactly two floats."""
    rng, found = random.Random(0), 0
    for _ in range(3000):
        line = "".join(rng.choice(["8", "7", "10", " ", " ", ",", ".5", "x", "\n"]) for _ in range(rng.randint(1, 6)))
        pieces = line.split("\n")[0].replace(",", " ").split(" ")
        official = None
        if len(pieces) == 2 and all(re.fullmatch(r"\d+(\.\d+)?|\.\d+", piece) for piece in pieces):
            official = tuple(float(piece) for piece in pieces)
        assert parse_scores(line, strict=True) == official, line
        assert official is None or parse_scores(line) == official
        found += official is not None
    assert found > 50


def test_the_worked_example_is_a_ratio_of_means_with_the_review_that_failed():
    pairs = [(8, 4), (2, 2), (-1, -1)]
    score = relative_score(pairs)
    assert abs(score - 100 * (5 / 3) / 3) < 0.05 and f"{score:.1f}" == "55.6"
    assert abs(score - 60) > 1  # what it would be without the failed review
    assert abs(score - 75) > 1  # the mean of the ratios 4/8 and 2/2


def test_means_are_rounded_to_three_decimals_first():
    assert relative_score([(1, 0), (1, 0), (1, 1)]) == pytest.approx(33.3, abs=1e-9)  # 0.333, not 1/3
    assert relative_score([(8, 9)]) == pytest.approx(112.5)
    assert relative_score(iter([[8, 4], (2, 2), None])) == relative_score([(8, 4), (2, 2), (-1, -1)])
    assert relative_score([(-1, -1), (-1, -1)]) == pytest.approx(100)  # as the official script; the tables print "-"


def test_no_percentage_of_nothing():
    with pytest.raises(Error, match="mean of the reference's scores is 0"):
        relative_score([(1, 5), (-1, -1)])
    with pytest.raises(Error, match="no reviews"):
        relative_score([])


# ---------------------------------------------------------------- a small benchmark


QUESTIONS = [
    {"question_id": 0, "image": "a.png", "text": "What is this?", "category": "conv"},
    {"question_id": 1, "image": "a.png", "text": "Describe {it}.", "category": "detail"},
    {"question_id": 2, "image": "b.png", "text": "Why <so>?", "category": "complex"},
    {"question_id": 3, "image": "b.png", "text": "How many?", "category": "conv"},
]
CAT = {"category": "cat", "bbox": [0.0, 0.1, 1.0, 0.25]}
STAR, HAT = {"category": "star", "bbox": [0.1, 0.2, 0.3, 0.4]}, {"category": "hat", "bbox": [0.5, 0.5, 0.75, 1.0]}
COCO = [
    {"id": "7", "image": "b.png", "captions": ["Two cats."], "instances": [CAT]},
    {"id": "5", "image": "a.png", "captions": ["A red star.", "One star"], "instances": [STAR, HAT]},
    {"id": "9", "image": "c.png", "captions": ["Nobody asks about this."], "instances": []},
]  # fmt: skip
WILD = [{"image": "a.png", "caption": "A red star."}, {"image": "b.png", "caption": ["Two cats.", "On a mat."]}]


@pytest.fixture
def bench(tmp_path) -> Path:
    """questions, context, reference and answers of a small benchmark, the last two in other orders."""
    write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    write_lines(tmp_path / "context.jsonl", COCO)
    answered = [{"question_id": i, "text": f"answer {i}", "answer_id": f"id{i}", "model_id": "m"} for i in (2, 0, 3, 1)]
    write_lines(tmp_path / "answers.jsonl", answered)
    told = [{"question_id": q["question_id"], "text": f"reference {q['question_id']}", "category": q["category"]}
            for q in reversed(QUESTIONS)]  # fmt: skip
    write_lines(tmp_path / "reference.jsonl", told)
    return tmp_path


def judge(folder: Path, *more: str) -> int:
    files = [f"--{name}={folder / name}.jsonl" for name in ("questions", "context", "reference", "answers")]
    return main(["llava-bench", "judge", *files, f"--out={folder / 'reviews.jsonl'}", *more])


def test_the_judge_reads_the_official_frame_to_the_letter(bench, appoint, capsys):
    teacher = appoint(lambda request: "8 6\nWhy not.")
    assert judge(bench) == 0
    user = next(r for r in teacher.asked if r.key == "1").messages[-1]
    rule = (Path(replies.__file__).parent / "rules" / "detail.txt").read_text().strip()
    assert user["role"] == "user" and user["content"] == (
        "[Context]\nA red star.\nOne star\n\nstar: [0.1, 0.2, 0.3, 0.4]\nhat: [0.5, 0.5, 0.75, 1.0]\n\n"
        "[Question]\nDescribe {it}.\n\n[Assistant 1]\nreference 1\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nanswer 1\n\n[End of Assistant 2]\n\n[System]\n{rule}\n\n"
    )
    assert [(r.messages[0]["role"], r.kind) for r in teacher.asked] == [("system", "judge")] * 4


def test_in_the_wild_has_a_caption_and_rules_of_its_own(bench, appoint, capsys):
    write_lines(bench / "context.jsonl", WILD)
    teacher = appoint(lambda request: "8 6")
    assert judge(bench) == 0
    texts = {r.key: r.messages[-1]["content"] for r in teacher.asked}
    assert texts["0"].startswith("[Context]\nA red star.\n\n[Question]\nWhat is this?\n\n")
    assert texts["2"].startswith("[Context]\nTwo cats.\nOn a mat.\n\n[Question]\nWhy <so>?\n\n")
    assert all("hand" in text for text in texts.values())  # the rules say how the image was described
    assert {row["category"] for row in read_lines(bench / "reviews.jsonl")} == {
        "llava_bench_conv", "llava_bench_detail", "llava_bench_complex"
    }  # fmt: skip
    output = capsys.readouterr().out
    assert "In-the-Wild" in output and "BLIP-2 | 54.6 | 29.1 | 32.9 | 38.1 |" in output


def test_answers_are_matched_by_id_not_by_their_order(bench, appoint, capsys):
    appoint(lambda request: "8 6\nWhy not.")
    assert judge(bench) == 0
    for row in read_lines(bench / "reviews.jsonl"):
        i = row["question_id"]
        assert (row["answer2_id"], row["category"]) == (f"id{i}", QUESTIONS[i]["category"])
        assert (row["content"], row["tuple"], row["teacher"]) == ("8 6\nWhy not.", [8, 6], Judge.name)


def test_every_category_has_its_rule_and_every_rule_asks_for_two_scores():
    for prefix in ("", "llava_bench_"):
        texts = [replies.rule(prefix + category) for category in ("conv", "detail", "complex")]
        assert len(set(texts)) == 3
        for text in texts:
            assert all(
                word in text for word in ("1 to 10", "first line", "space", "helpful", "accurate", "detail", "order")
            )


# ---------------------------------------------------------------- the table


SCORES = {0: "8 4", 1: "10, 9", 2: "cannot say", 3: "2 2 "}
# by hand: conv (8,4),(2,2): 3/5; detail 9/10; complex none; all (8,4),(10,9),(-1,-1),(2,2): means 4.75 and 3.5
TABLE = {
    "m": ["60.0", "90.0", "-", "73.7"],
    "its mean score x 10": ["30.0", "90.0", "-", "35.0"],
    "the reference's x 10": ["50.0", "100.0", "-", "47.5"],
    "reviews": ["2", "1", "1", "4"],
    "published: all instruction data": ["83.1", "75.3", "96.5", "85.1"],
    "published: no instruction tuning": ["22.0", "24.0", "18.5", "21.5"],
}


def cells(output: str) -> dict[str, list[str]]:
    """The rows of a Markdown table."""
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in output.splitlines() if line.startswith("|")]
    return {name: values for name, *values in rows}


def test_the_table_by_hand(bench, appoint, capsys):
    appoint(lambda request: SCORES[int(request.key)] + "\nReasons.")
    assert judge(bench) == 0
    output = capsys.readouterr().out
    assert main(["llava-bench", "table", str(bench / "reviews.jsonl")]) == 0
    assert capsys.readouterr().out == output
    assert cells(output)[""] == ["conversation", "detailed description", "complex reasoning", "all"]
    assert {name: row for name, row in cells(output).items() if name in TABLE} == TABLE
    assert "without scores" in output and ": 1 (2)" in output and Judge.name in output


def test_the_strict_table_reads_less(bench, appoint, capsys):
    appoint(lambda request: SCORES[int(request.key)] + "\nReasons.")
    judge(bench)
    capsys.readouterr()
    assert main(["llava-bench", "table", "--strict", str(bench / "reviews.jsonl")]) == 0
    output = capsys.readouterr().out
    # "10, 9" and "2 2 " have no scores now: conv (8,4),(-1,-1): 1.5/3.5
    assert cells(output)["m"][:3] == ["42.9", "-", "-"] and ": 3 (" in output


def test_a_judge_that_never_gives_scores_is_one_line_and_loses_nothing(bench, appoint, capsys):
    teacher = appoint(lambda request: "I would rather not.")
    assert judge(bench) == 2
    output, errors = capsys.readouterr()
    assert cells(output)["m"] == ["-"] * 4
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [errors.splitlines()[-1]]
    assert "none of the 4 reviews has scores" in errors
    assert [row["tuple"] for row in read_lines(bench / "reviews.jsonl")] == [[-1, -1]] * 4
    assert judge(bench) == 2 and len(teacher.asked) == 4  # what was judged is judged


def test_official_reviews_are_read_too(tmp_path, capsys):
    """With "tuple" and without the text."""
    rows = [
        {"question_id": 1, "category": "conv", "tuple": [8, 4]},
        {"question_id": 2, "category": "conv", "tuple": [-1, -1]},
    ]
    assert main(["llava-bench", "table", str(write_lines(tmp_path / "their-model.jsonl", rows))]) == 0
    assert cells(capsys.readouterr().out)["their-model"] == ["42.9", "-", "-", "42.9"]  # 1.5 / 3.5


# ---------------------------------------------------------------- what can be wrong


def edit(name: str, change: Callable[[list[dict]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        rows = read_lines(folder / name)
        change(rows)
        write_lines(folder / name, rows)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


WRONG = [
    (lambda folder: (folder / "answers.jsonl").unlink(), "answers.jsonl: cannot be read (No such file"),
    (lambda folder: (folder / "answers.jsonl").write_text(""), "answers.jsonl: is empty"),
    (cut("answers.jsonl"), "answers.jsonl, line 4: is not whole JSON"),
    (cut("reference.jsonl"), "reference.jsonl, line 4: is not whole JSON"),
    (cut("questions.jsonl"), "questions.jsonl, line 4: is not whole JSON"),
    (cut("context.jsonl"), "context.jsonl, line 3: is not whole JSON"),
    (lambda folder: (folder / "answers.jsonl").write_bytes(b"\xff\xfe"), "answers.jsonl: is not UTF-8"),
    (lambda folder: (folder / "answers.jsonl").write_text("[1]\n"), "answers.jsonl, line 1: holds a list"),
    (edit("answers.jsonl", lambda rows: rows.append(rows[0] | {"question_id": 95})), "ids that"),
    (edit("answers.jsonl", lambda rows: rows.append(rows[0] | {"question_id": 95})), "does not have: 1 (95)"),
    (edit("answers.jsonl", lambda rows: rows.append(rows[0])), "line 5: question_id 2 is there twice"),
    (edit("answers.jsonl", lambda rows: rows.pop(1)), "of 4 questions these are missing: 1 (0)"),
    (edit("answers.jsonl", lambda rows: rows[1].pop("question_id")), 'line 2: the field "question_id" is missing'),
    (edit("answers.jsonl", lambda rows: rows[1].update(text=None)), 'question_id 0: the field "text" is missing'),
    (
        edit("answers.jsonl", lambda rows: rows[3].update(text="\ud83d")),
        'question_id 1: the field "text" is missing, or no',
    ),
    (edit("reference.jsonl", lambda rows: rows[0].update(category="detail")), "question_id 3: category 'detail', but"),
    (edit("reference.jsonl", lambda rows: rows.pop()), "reference.jsonl: of 4 questions these are missing: 1 (0)"),
    (
        edit("questions.jsonl", lambda rows: rows[0].update(category="maths")),
        "question_id 0: category 'maths' has no rule",
    ),
    (
        edit("questions.jsonl", lambda rows: rows[0].update(image="z.png")),
        "context.jsonl: image z.png of question_id 0",
    ),
    (edit("context.jsonl", lambda rows: rows[0].update(captions=[])), "context.jsonl, line 1: captions"),
    (edit("context.jsonl", lambda rows: rows.append(rows[0])), "image b.png is there twice"),
    (edit("context.jsonl", lambda rows: rows[1].update(caption=None)), 'image b.png: "caption" must be'),
    (edit("context.jsonl", lambda rows: rows[0].update(caption="\ud800")), 'image b.png: "caption" must be'),
]


@pytest.mark.parametrize(("damage", "message"), WRONG, ids=[message for _, message in WRONG])
def test_files_that_do_not_fit_are_one_line_before_anybody_is_asked(bench, appoint, capsys, damage, message):
    teacher = appoint(lambda request: "8 6")
    damage(bench)
    assert judge(bench) == 2
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n"), teacher.asked) == ("", 1, [])
    assert message in errors and errors.startswith("error: ")


def test_reviews_are_not_mixed_with_those_of_other_answers_rules_or_judges(bench, appoint, capsys, monkeypatch):
    appoint(lambda request: "8 6")
    assert judge(bench) == 0
    before = (bench / "reviews.jsonl").read_bytes()
    edit("answers.jsonl", lambda rows: rows[0].update(text="another answer"))(bench)
    assert judge(bench) == 2
    assert 'reviews.jsonl: question 2 was made with another "request"' in capsys.readouterr().err
    edit("answers.jsonl", lambda rows: rows[0].update(text="answer 2"))(bench)
    monkeypatch.setattr(Judge, "name", "another judge")
    assert judge(bench) == 2
    assert "another \"teacher\" ('a judge on the bench', now 'another judge')" in capsys.readouterr().err
    monkeypatch.undo()
    appoint(lambda request: "8 6").temperature = 0.7
    assert judge(bench) == 2
    assert 'another "temperature" (None, now 0.7)' in capsys.readouterr().err
    write_lines(bench / "questions.jsonl", QUESTIONS[:3])
    for name in ("answers.jsonl", "reference.jsonl"):
        edit(name, lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["question_id"] != 3]))(bench)
    appoint(lambda request: "8 6")
    assert judge(bench) == 2
    assert "question 3 is none of the questions now" in capsys.readouterr().err
    assert (bench / "reviews.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "category": "conv"}], 'needs "content"'),
        ([{"question_id": 1, "category": "conv", "tuple": [1, "x"]}], 'needs "content"'),
        ([{"question_id": 1, "category": "conv", "tuple": [1, float("nan")]}], 'needs "content"'),
        ([{"question_id": 1, "category": "conv", "tuple": [10**400, 1]}], 'needs "content"'),
        ([{"question_id": 1, "category": "maths", "tuple": [1, 1]}], "'maths'"),
        ([{"question_id": 1, "tuple": [1, 1]}], '"category" is missing'),
        ([{"question_id": 1, "category": "conv", "tuple": [1, 1]},
          {"question_id": 2, "category": "llava_bench_conv", "tuple": [1, 1]}], "both benchmarks"),
        ([{"question_id": 1, "category": "conv", "content": "0 1"}], "mean of the reference's scores is 0"),
    ],
)  # fmt: skip
def test_reviews_that_make_no_table(tmp_path, capsys, rows, message):
    assert main(["llava-bench", "table", str(write_lines(tmp_path / "reviews.jsonl", rows))]) == 2
    output, errors = capsys.readouterr()
    assert message in errors and errors.count("\n") == 1 and "|" not in output


# ---------------------------------------------------------------- runs that were stopped


def test_a_judgement_that_was_stopped_goes_on_and_asks_nobody_twice(bench, appoint, capsys):
    def says(request: Request) -> str:
        return f"{request.key} 6\nReasons."

    whole = appoint(says)
    assert judge(bench) == 0
    expected, output = read_lines(bench / "reviews.jsonl"), capsys.readouterr().out
    (bench / "reviews.jsonl").unlink()
    asked: list[str] = []

    def stops(request: Request) -> str:
        if len(asked) in (1, 2):
            asked.append("")
            raise KeyboardInterrupt if len(asked) == 2 else Unanswered("busy")
        asked.append(request.key)
        return says(request)

    appoint(stops)
    assert judge(bench) == 130
    assert len(read_lines(bench / "reviews.jsonl")) == 1
    assert judge(bench) == 1
    assert "1 of 4 have no reply yet; the same command asks for them" in capsys.readouterr().err
    assert judge(bench) == 0
    assert sorted(read_lines(bench / "reviews.jsonl"), key=lambda row: row["question_id"]) == expected
    assert capsys.readouterr().out == output
    assert sorted(filter(None, asked)) == sorted(r.key for r in whole.asked)


def test_reviews_cut_off_anywhere_are_finished(bench, appoint, capsys):
    appoint(lambda request: f"1{request.key} 6\nReasons.")
    assert judge(bench) == 0
    whole = (bench / "reviews.jsonl").read_bytes()
    lines = [0] + [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for end in (0, 17, lines[1], lines[2] + 40, lines[3] - 1, lines[4] - 1):
        (bench / "reviews.jsonl").write_bytes(whole[:end])
        status = main(["llava-bench", "table", str(bench / "reviews.jsonl")])
        assert status == (0 if {end, end + 1} & set(lines[1:]) else 2)  # half a line is an error, if only for the table
        teacher = appoint(lambda request: f"1{request.key} 6\nReasons.")
        assert judge(bench) == 0 and (bench / "reviews.jsonl").read_bytes() == whole
        assert len(teacher.asked) == 4 - sum(line <= end for line in lines[1:])


def test_two_judgements_into_one_file_are_one_too_many(bench, appoint, capsys):
    teacher = appoint(lambda request: "8 6")
    with alone(bench / "reviews.jsonl"):
        assert judge(bench) == 2
    assert "reviews.jsonl: another run is writing to it" in capsys.readouterr().err
    assert teacher.asked == [] and not (bench / "reviews.jsonl").exists()
    assert judge(bench) == 0


def test_two_models_that_answer_into_one_file_are_one_too_many(pictures, capsys):
    with alone(pictures / "out"):
        assert answer(pictures, pictures / "out") == 2
    assert "out: another run is writing to it" in capsys.readouterr().err and not (pictures / "out").exists()
    assert answer(pictures, pictures / "out") == 0


def test_a_language_model_in_a_folder_can_judge(bench, scripted_model, capsys):
    from nanollava.checkpoint import save_language

    model = scripted_model.says("8,6", positions=4000)
    save_language(model.language, model.tokenizer, bench / "vicuna")
    assert judge(bench, f"--teacher={bench / 'vicuna'}") == 0
    assert cells(capsys.readouterr().out)["m"] == ["75.0"] * 4
    (teacher,) = {row["teacher"] for row in read_lines(bench / "reviews.jsonl")}
    assert re.fullmatch(r"vicuna \(a local model, weights [0-9a-f]{8}\)", teacher)
    assert {row["temperature"] for row in read_lines(bench / "reviews.jsonl")} == {0.2}
    model.language.norm.weight.data *= 2
    save_language(model.language, model.tokenizer, bench / "other" / "vicuna")
    assert judge(bench, f"--teacher={bench / 'other' / 'vicuna'}") == 2
    assert 'was made with another "teacher"' in capsys.readouterr().err


def test_the_rules_of_the_drawn_world_cannot_judge(bench, capsys):
    assert judge(bench, "--teacher=miniature") == 2
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1) and "--teacher endpoint, or the FOLDER" in errors


@pytest.fixture
def pictures(tmp_path) -> Path:
    """images/, and questions of many lengths about them."""
    (tmp_path / "images").mkdir()
    rng = random.Random(3)
    for seed, name in enumerate(("a.png", "b.png")):
        draw(random_scene(rng, "test", 3), seed)[0].save(tmp_path / "images" / name)
    long = "What colour is the circle? And what shape is the object to the right of the circle, if there is one?"
    texts = ["How many objects are there?", "Describe the picture in detail.", "Is there a star?", "Hi.", long]
    rows = [{"question_id": i, "image": ("a.png", "b.png")[i % 2], "text": text} for i, text in enumerate(texts)]
    write_lines(tmp_path / "questions.jsonl", rows)
    return tmp_path


def answer(folder: Path, out: Path, *more: str, model: Path = MINIATURE) -> int:
    inputs = [f"--questions={folder / 'questions.jsonl'}", f"--images={folder / 'images'}", "--device=cpu"]
    return main(["llava-bench", "answer", str(model), *inputs, f"--out={out}", "--max-new-tokens=24", *more])


def test_batched_answers_are_the_single_ones_and_those_of_chat(pictures, capsys):
    for name, size in (("single", 1), ("pairs", 2), ("batch", 8)):
        assert answer(pictures, pictures / name, f"--batch-size={size}") == 0
    assert (pictures / "single").read_bytes() == (pictures / "pairs").read_bytes() == (pictures / "batch").read_bytes()
    from nanollava import load

    model = load(MINIATURE, "cpu")
    for row, question in zip(read_lines(pictures / "batch"), read_lines(pictures / "questions.jsonl"), strict=True):
        expected = model.answer(pictures / "images" / question["image"], question["text"], max_new_tokens=24)
        assert (row["text"], row["prompt"], row["question_id"]) == (expected, question["text"], question["question_id"])
        assert row["model_id"] == "miniature" and row["metadata"]["template"] == "vicuna_v1" and row["answer_id"]


def test_answers_cut_off_anywhere_are_finished_as_if_nothing_had_been(pictures, capsys):
    assert answer(pictures, pictures / "whole", "--batch-size=2") == 0
    whole = (pictures / "whole").read_bytes()
    lines = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for end in (0, 17, lines[0], lines[1] + 40, lines[2], lines[3] - 1, lines[4] - 1, lines[4]):
        (pictures / "cut").write_bytes(whole[:end])
        assert answer(pictures, pictures / "cut", "--batch-size=2") == 0
        assert (pictures / "cut").read_bytes() == whole, end


def test_ctrl_c_keeps_the_answers_that_are_there(pictures, capsys, monkeypatch):
    assert answer(pictures, pictures / "whole") == 0
    from nanollava.evaluate import answers

    original, calls = answers.generate, []

    def interrupted(*args):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(answers, "generate", interrupted)
    assert answer(pictures, pictures / "stopped", "--batch-size=2") == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert len(read_lines(pictures / "stopped")) == 4
    assert answer(pictures, pictures / "stopped", "--batch-size=2") == 0
    assert calls == [2, 2, 1, 1]
    assert (pictures / "stopped").read_bytes() == (pictures / "whole").read_bytes()


def test_a_process_that_was_killed_lost_nothing(pictures, capsys):
    assert answer(pictures, pictures / "whole") == 0
    out, words = pictures / "killed", ["--device=cpu", "--max-new-tokens=24", "--batch-size=1"]
    words += [f"--questions={pictures / 'questions.jsonl'}", f"--images={pictures / 'images'}", f"--out={out}"]
    command = [sys.executable, "-m", "nanollava.evaluate", "llava-bench", "answer", str(MINIATURE), *words]
    process = subprocess.Popen(command, cwd=MINIATURE.parents[1], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert out.stat().st_size
    assert answer(pictures, out) == 0
    assert out.read_bytes() == (pictures / "whole").read_bytes()


def test_pictures_may_have_the_names_of_val2014(pictures, capsys):
    assert answer(pictures, pictures / "short") == 0
    (pictures / "images" / "b.png").rename(pictures / "images" / "COCO_val2014_b.png")
    assert answer(pictures, pictures / "long") == 0
    assert (pictures / "long").read_bytes() == (pictures / "short").read_bytes()


def test_names_that_no_picture_can_have_are_left_to_the_check_of_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", "n" * 300, "a\0b"):
        assert find_image(Path("."), name) == Path(".") / name


WRONG_ANSWERS = [
    (
        edit("questions.jsonl", lambda rows: rows[1].update(text="Another one?")),
        'out: question 1 was made with another "prompt"',
    ),
    (edit("questions.jsonl", lambda rows: rows.pop()), "out: question 4 is none of the questions now"),
    (
        edit("questions.jsonl", lambda rows: rows[0].update(image="../a.png")),
        "questions.jsonl: question_id 0: image name '../a.png' leads out of the image folder",
    ),
    (lambda folder: (folder / "images" / "b.png").unlink(), "1 of the images cannot be used; the first: "),
    (lambda folder: (folder / "images" / "b.png").write_text(""), "b.png: the image is an empty file"),
    (lambda folder: (folder / "questions.jsonl").unlink(), "questions.jsonl: cannot be read"),
    (lambda folder: (folder / "out").write_text("{}\n" + (folder / "out").read_text()), "out, line 1: damaged"),
]


@pytest.mark.parametrize(("damage", "message"), WRONG_ANSWERS, ids=[message for _, message in WRONG_ANSWERS])
def test_what_is_wrong_with_questions_is_one_line_and_no_answer_is_lost(pictures, capsys, damage, message):
    assert answer(pictures, pictures / "out") == 0
    damage(pictures)
    before = (pictures / "out").read_bytes()
    capsys.readouterr()
    assert answer(pictures, pictures / "out") == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert (pictures / "out").read_bytes() == before


def test_a_question_without_room_for_an_answer_is_told_before_the_first_answer(pictures, capsys):
    edit("questions.jsonl", lambda rows: rows[3].update(text="word " * 300))(pictures)
    assert answer(pictures, pictures / "out") == 2
    errors = capsys.readouterr().err
    assert "question 3: takes" in errors and errors.count("\n") == 1
    assert (pictures / "out").read_bytes() == b""


def test_answers_of_other_weights_or_settings_go_into_another_file(pictures, capsys, scripted_model):
    from nanollava import checkpoint

    assert answer(pictures, pictures / "out") == 0
    assert answer(pictures, pictures / "out", "--max-new-tokens=9") == 2
    assert 'was made with another "metadata"' in capsys.readouterr().err
    checkpoint.save(scripted_model.says("Yes."), pictures / "other")
    assert answer(pictures, pictures / "out", model=pictures / "other") == 2
    assert '"model_id"' in capsys.readouterr().err
    assert answer(pictures, pictures / "out", "--batch-size=0") == 2
    assert "--batch-size 0: give 1 or more" in capsys.readouterr().err


def test_a_stage_1_model_is_asked_in_vicuna_s_template(pictures, scripted_model, capsys):
    """The paper's row without instruction tuning: it is asked like the others, not made to caption."""
    from nanollava import checkpoint

    checkpoint.save(scripted_model.says("Yes.", template="plain", stage="stage1"), pictures / "model")
    edit("questions.jsonl", lambda rows: rows.pop())(pictures)  # 400 positions, and hardly a word in the vocabulary
    assert answer(pictures, pictures / "out", model=pictures / "model") == 0
    rows = read_lines(pictures / "out")
    assert {row["text"] for row in rows} == {"Yes."} and rows[0]["metadata"]["template"] == "vicuna_v1"


# ---------------------------------------------------------------- the published files


def scores_by_length(text: str) -> tuple[int, int]:
    """Scores that a judge gives for a reference answer of that length."""
    return 5 + len(text) % 6, 1 + len(text) % 4


def judge_published(published: Path, fixtures: Path, out: Path, *more: str) -> int:
    source = fixtures / "llava_bench_coco"
    files = [f"--questions={published / 'questions.jsonl'}", f"--answers={published / 'answers.jsonl'}"]
    files += [f"--context={source / 'caps_boxes_coco2014_val_80.jsonl'}"]
    files += [f"--reference={source / 'qa90_gpt4_answer.jsonl'}"]
    return main(["llava-bench", "judge", *files, f"--out={out}", *more])


def check_published_table(output: str, rows: list[dict], references: dict[int, str]) -> None:
    """The table against sums by hand."""
    table = cells(output)
    for column, category in enumerate(("conv", "detail", "complex", None)):
        pairs = [scores_by_length(references[r["question_id"]]) for r in rows if category in (r["category"], None)]
        reference, model = (round(sum(scores) / len(pairs), 3) for scores in zip(*pairs, strict=True))
        assert table["miniature"][column] == f"{100 * model / reference:.1f}"
        assert table["reviews"][column] == str(len(pairs)) == ("90" if category is None else "30")


def test_the_published_questions_from_drawn_pictures_to_the_table(published, fixtures, tmp_path, appoint, capsys):
    rows = read_lines(published / "questions.jsonl")
    source = fixtures / "llava_bench_coco"
    references = {row["question_id"]: row["text"] for row in read_lines(source / "qa90_gpt4_answer.jsonl")}
    contexts = {row["image"]: row for row in read_lines(source / "caps_boxes_coco2014_val_80.jsonl")}
    told = {row["question_id"]: row["text"] for row in read_lines(published / "answers.jsonl")}
    teacher = appoint(lambda request: "{} {}\nReasons.".format(*scores_by_length(references[int(request.key)])))
    capsys.readouterr()
    assert judge_published(published, fixtures, tmp_path / "reviews.jsonl") == 0
    check_published_table(capsys.readouterr().out, rows, references)
    for row, request in zip(rows, sorted(teacher.asked, key=lambda r: int(r.key)), strict=True):
        i, context = row["question_id"], contexts[row["image"]]
        boxes = "\n".join(f"{box['category']}: {box['bbox']}" for box in context["instances"])
        assert request.messages[-1]["content"] == (
            "[Context]\n" + "\n".join(context["captions"]) + f"\n\n{boxes}\n\n[Question]\n{row['text']}\n\n"
            f"[Assistant 1]\n{references[i]}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{told[i]}\n\n[End of Assistant 2]\n\n[System]\n{replies.rule(row['category'])}\n\n"
        )
