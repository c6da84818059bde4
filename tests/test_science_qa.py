"""ScienceQA: prompts and records to the letter, letters out of texts, the paper's columns by hand on problems that
overlap in them, both combinations with a teacher, and runs that were stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nanollava import checkpoint
from nanollava.evaluate import problems as sqa
from nanollava.evaluate import replies
from nanollava.evaluate.__main__ import main
from nanollava.evaluate.science_qa import extract_answer
from nanollava.evaluate.science_scores import COLUMNS, accuracy, arbitrate, choose, complement, differing
from nanollava.instruct.teacher import Reply, Request, Teacher
from nanollava.train.records import read_records

TABLE = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "avg")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("E", "E"),
        ("F", None),
        ("B. Because it melts.", "B"),
        ("B.", None),  # too short for "B. ", and there is no sentence
        ("B.x", None),
        ("b", None),
        (" B", None),
        ("Ice melts. The answer is C.", "C"),
        ("The answer is C", None),  # one more sign has to follow
        ("The answer is C, surely", "C"),
        ("The answer is C\n", None),  # but not the line's end
        ("The answer is Q.", "Q"),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is A. The answer is A.", None),
        ("A. The answer is B.", "A"),  # the beginning counts first
        ("The answer is (B).", None),
        ("the answer is B.", None),
        ("AB", None),
        ("", None),
    ],
)
def test_a_letter_is_found_by_the_official_rules(text, letter):
    assert extract_answer(text) == letter


# ---------------------------------------------------------------- prompts and records


def problem(i: str, **fields) -> sqa.Problem:
    raw = RAW | fields
    return sqa.make_problem(i, raw, Path("problems.json"))


RAW = {
    "question": "Which is  colder?", "choices": ["ice", "steam "], "answer": 0, "hint": "Water can be  solid.\nOr not.",
    "image": None, "lecture": "Heat is motion.\nLess is colder.", "solution": "Ice moves least.",
    "subject": "natural science", "grade": "grade3", "task": "closed choice", "split": "train",
}  # fmt: skip


def test_the_paper_s_prompt_to_the_letter():
    asked = "Which is colder?\nContext: Water can be solid.\nOr not.\nOptions: (A) ice (B) steam"
    assert sqa.prompt(problem("1"), "QCM-LEA") == asked
    told = "Heat is motion.\nLess is colder. Ice moves least. The answer is A."
    assert sqa.target(problem("1"), "QCM-LEA") == told
    assert sqa.make_record(problem("1"), "QCM-LEA") == {
        "id": "1", "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
    }  # fmt: skip


def test_v1_5_s_prompt_to_the_letter():
    asked = "Context: Water can be solid.\nOr not.\nQuestion: Which is colder?\nOptions: (A) ice (B) steam"
    assert sqa.prompt(problem("1"), "CQM-A") == asked
    assert sqa.target(problem("1"), "CQM-A") == "The answer is A."
    only = "Answer with the option's letter from the given choices directly."
    assert sqa.question(problem("1"), "CQM-A") == f"{asked}\n{only}"
    assert sqa.question(problem("1", image="image.png"), "CQM-A") == f"<image>\n{asked}\n{only}"


def test_corners_of_the_official_words():
    bare = problem("4", hint="", lecture="", solution="", image="image.png", choices=["a", "b", "c"], answer=2)
    assert sqa.prompt(bare, "QCM-LEA") == "Which is colder?\nContext: N/A\nOptions: (A) a (B) b (C) c"
    record = sqa.make_record(bare, "QCM-LEA")
    assert record["image"] == "4/image.png" and record["conversations"][0]["value"].endswith("(C) c\n<image>")
    assert record["conversations"][1]["value"] == " The answer is C."  # of three spaces the one pass leaves two
    four = problem("5", question="Is it a    b?", lecture="Answer: it is.", hint="Question: what?")
    assert sqa.prompt(four, "QCM-LEA").startswith("Is it a  b?\nContext: what?\n")  # one pass, and all its marks go
    assert sqa.prompt(four, "CQM-A").startswith("Context: Question: what?\nQuestion: Is it a  b?\n")
    assert sqa.target(four, "QCM-LEA") == "it is. Ice moves least. The answer is A."


# ---------------------------------------------------------------- the paper's columns


# Six problems that overlap in subject, context and grade; the right choice is always 0.
#            subject             hint  image  grade
PROBLEMS = {
    "1": ("natural science", "h", None, 1),
    "2": ("natural science", "", "image.png", 6),
    "3": ("natural science", "h", "image.png", 7),
    "4": ("social science", "", "image.png", 12),
    "5": ("social science", "", None, 2),
    "6": ("language science", "", None, 8),
}  # fmt: skip
TEXTS = {
    "1": "A", "2": "B", "3": "It is warm. The answer is A.", "4": "The answer is E.", "5": "A. So it is.",
}  # right, wrong, right, none of its choices, right; 6 is missing  # fmt: skip
# by hand: NAT 1,2,3: 2/3; SOC 4,5: 1/2; LAN 6: 0/1; TXT 1,3: 2/2; IMG 2,3,4: 1/3; NO 5,6: 1/2;
# grades 1-6 are 1,2,5: 2/3; 7-12 are 3,4,6: 1/3; all 3/6
SHARES = dict(
    zip(TABLE, ("66.67", "50.00", "0.00", "100.00", "33.33", "50.00", "66.67", "33.33", "50.00"), strict=True)
)


JUDGE = ["91.56", "96.74", "91.09", "90.62", "88.99", "93.52", "92.73", "92.16", "92.53"]  # the paper's last row


def fields(i: str) -> dict:
    subject, hint, image, grade = PROBLEMS[i]
    return RAW | {
        "subject": subject,
        "hint": hint,
        "image": image,
        "grade": f"grade{grade}",
        "choices": ["x", "y", "z"],
    }


@pytest.fixture
def data(tmp_path) -> Path:
    """problems.json, pid_splits.json and the pictures of a split of six, and one problem more of another split."""
    raw = {i: fields(i) for i in PROBLEMS} | {"7": RAW}
    (tmp_path / "problems.json").write_text(json.dumps(raw))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list("651234"), "train": ["7"], "val": []}))
    for i in "234":
        (tmp_path / "images" / i).mkdir(parents=True)
        Image.new("RGB", (20, 16), "red").save(tmp_path / "images" / i / "image.png")
    return tmp_path


def write_lines(file: Path, texts: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i, text in texts.items()))
    return file


def cells(output: str) -> dict[str, list[str]]:
    """The rows of a Markdown table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    return {Path(name).name: values for name, *values in rows if name != "---"}


def run(data: Path, step: str, *more: object) -> int:
    return main(["science-qa", step, f"--data={data}", *map(str, more)])


def test_columns_by_hand():
    made = {i: sqa.make_problem(i, fields(i), Path("p")) for i in PROBLEMS}
    shares = accuracy(made, choose(made, TEXTS))
    assert tuple(COLUMNS) == TABLE
    assert {name: f"{share:.2f}" for name, share in shares.items()} == SHARES
    assert accuracy({"1": made["1"]}, {"1": 0})["IMG"] is None


def test_the_score_table_says_what_counted_as_wrong(data, capsys):
    write_lines(data / "ours.jsonl", TEXTS)
    assert run(data, "score", f"--answers={data / 'ours.jsonl'}") == 0
    output = capsys.readouterr().out
    assert cells(output)["ours.jsonl"] == list(SHARES.values())
    assert cells(output)[""] == list(TABLE)
    assert cells(output)["published: judge"] == JUDGE
    assert "counted as wrong: no answer 1 (6); none of the choices 1 (4)" in output
    lines = (data / "ours.jsonl").read_text().splitlines(keepends=True)
    (data / "ours.jsonl").write_text("".join(reversed(lines)))  # order does not matter
    assert run(data, "score", f"--answers={data / 'ours.jsonl'}") == 0
    assert capsys.readouterr().out == output


# ---------------------------------------------------------------- with a teacher


OURS = {"1": 0, "2": 1, "3": 0, "4": None, "5": 0, "6": None}
THEIRS = {"1": 1, "2": 0, "3": None, "4": 2, "5": 0, "6": None}


def test_combinations_by_hand():
    assert complement(OURS, THEIRS) == {"1": 1, "2": 0, "3": 0, "4": 2, "5": 0, "6": None}
    assert differing(OURS, THEIRS) == ["1", "2", "3", "4"]
    decided = arbitrate(OURS, THEIRS, {"1": 2, "2": None, "4": 0, "5": 1})
    assert decided == {"1": 2, "2": 1, "3": 0, "4": 0, "5": 0, "6": None}  # 3 has no verdict, 5 needs none


class Scholar(Teacher):
    """Says what its table has for a problem, and keeps what it was asked."""

    name = "a scholar"

    def __init__(self, texts: dict[str, str]):
        self.texts, self.asked = texts, []

    def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        if isinstance(self.texts[request.key], type):
            raise self.texts[request.key]
        return Reply(self.texts[request.key], 50, 5)


@pytest.fixture
def appoint(monkeypatch) -> Callable[[dict], Scholar]:
    def appoint(texts: dict[str, str]) -> Scholar:
        scholar = Scholar(texts)
        monkeypatch.setattr(replies, "open_teacher", lambda args: scholar)
        return scholar

    return appoint


GPT4 = {
    "1": "It is y. The answer is B.", "2": "The answer is A.", "3": "I cannot see the image.", "4": "The answer is C.",
    "5": "The answer is A.", "6": "Who knows?",
}  # fmt: skip
VERDICTS = {"1": "The answer is C.", "2": "Neither, really.", "3": "The answer is D.", "4": "The answer is A."}


def test_both_combinations_from_files_to_the_table(data, appoint, capsys):
    """Ours are right on 1, 3, 5; the teacher's on 2, 5; the complement's on 2, 3, 5; the judge loses 1 and finds 4."""
    ours, told, judged = (data / name for name in ("ours.jsonl", "gpt4.jsonl", "judged.jsonl"))
    write_lines(ours, TEXTS)
    scholar = appoint(GPT4)
    assert run(data, "ask", f"--out={told}") == 0
    prompts = {request.key: request.messages[-1]["content"] for request in scholar.asked}
    assert prompts["5"] == "Which is colder?\nContext: N/A\nOptions: (A) x (B) y (C) z" and len(prompts) == 6
    scholar = appoint(VERDICTS)
    both = [f"--answers={ours}", f"--teacher-answers={told}"]
    assert run(data, "judge", *both, f"--out={judged}") == 0
    assert sorted(request.key for request in scholar.asked) == ["1", "2", "3", "4"]
    shown = next(r for r in scholar.asked if r.key == "3").messages[-1]["content"]
    assert TEXTS["3"] in shown and GPT4["3"] in shown and "Which is colder?" in shown
    capsys.readouterr()
    assert run(data, "score", *both, f"--judged={judged}") == 0
    output = capsys.readouterr().out
    assert {name: row[-1] for name, row in cells(output).items() if not name.startswith("published")} == {
        "": "avg", "ours.jsonl": "50.00", "gpt4.jsonl": "33.33", "complement": "50.00", "judge": "50.00"
    }  # fmt: skip
    assert cells(output)["judge"][:3] == ["33.33", "100.00", "0.00"]  # 3 of 1, 2, 3; 4 and 5; not 6
    assert "without a verdict, so that the model's answer counts: 2 (2, 3)" in output


def test_a_judgement_that_was_stopped_goes_on_and_asks_nobody_twice(data, appoint, capsys):
    ours, told, judged = (data / name for name in ("ours.jsonl", "gpt4.jsonl", "judged.jsonl"))
    write_lines(ours, TEXTS), write_lines(told, GPT4)
    step = ["judge", f"--answers={ours}", f"--teacher-answers={told}", f"--out={judged}"]
    scholar = appoint(VERDICTS | {"2": KeyboardInterrupt})
    assert run(data, *step) == 130
    asked = [r.key for r in scholar.asked if r.key != "2"]
    scholar = appoint(VERDICTS)
    assert run(data, *step) == 0
    assert sorted(asked + [r.key for r in scholar.asked]) == ["1", "2", "3", "4"]
    assert run(data, *step) == 0 and "0 of them new" in capsys.readouterr().err
    write_lines(ours, TEXTS | {"2": "C"})  # now the verdict on 2 is on another answer
    assert run(data, "score", *step[1:3], f"--judged={judged}") == 2
    assert "judged.jsonl: problem 2: the verdict is on other answers" in capsys.readouterr().err


def test_gpt_4_s_own_file_is_read_as_it_is_published(data, capsys):
    write_lines(data / "ours.jsonl", TEXTS)
    (data / "gpt4.json").write_text(json.dumps({"acc": 50.0, "outputs": GPT4}))
    both = [f"--answers={data / 'ours.jsonl'}", f"--teacher-answers={data / 'gpt4.json'}"]
    assert run(data, "score", *both) == 0
    assert cells(capsys.readouterr().out)["complement"][-1] == "50.00"
    for content in ({"acc": 50.0}, {"outputs": GPT4 | {"1": "\ud800"}}):
        (data / "gpt4.json").write_text(json.dumps(content))
        assert run(data, "score", *both) == 2
        assert 'gpt4.json: needs the field "outputs"' in capsys.readouterr().err


def test_half_a_character_of_a_teacher_s_spoils_no_file(data, appoint, capsys):
    write_lines(data / "ours.jsonl", TEXTS)
    appoint(GPT4 | {"1": "\ud83d It is y. The answer is B."})
    assert run(data, "ask", f"--out={data / 'gpt4.jsonl'}") == 0
    assert run(data, "score", f"--answers={data / 'ours.jsonl'}", f"--teacher-answers={data / 'gpt4.jsonl'}") == 0
    assert cells(capsys.readouterr().out)["complement"][-1] == "50.00"


def test_where_nobody_differs_nobody_is_asked(data, appoint, capsys):
    write_lines(data / "ours.jsonl", TEXTS)
    scholar, judged = appoint({}), data / "judged.jsonl"
    both = [f"--answers={data / 'ours.jsonl'}", f"--teacher-answers={data / 'ours.jsonl'}"]
    assert run(data, "judge", *both, f"--out={judged}") == 0 and scholar.asked == []
    assert run(data, "score", *both, f"--judged={judged}") == 0
    assert cells(capsys.readouterr().out)["judge"] == list(SHARES.values())


# ---------------------------------------------------------------- a model answers, a model learns


def test_records_are_what_training_reads(data, tiny_tokenizer_file, scripted_model, capsys):
    for form in sqa.FORMATS:
        assert run(data, "records", "--split=test", f"--prompt={form}", f"--out={data / 'train.json'}") == 0
        assert "6 records, 3 of them with an image" in capsys.readouterr().out
        model = scripted_model.says("Yes.", positions=2000)
        settings = (model.tokenizer, model.config, "vicuna_v1")
        examples, report = read_records(data / "train.json", data / "images", *settings)
        assert (len(examples), report.findings) == (6, [])


def test_a_model_answers_and_a_restart_goes_on(data, scripted_model, capsys):
    checkpoint.save(scripted_model.says("B", positions=2000), data / "model")
    out, step = data / "ours.jsonl", ["answer", data / "model", f"--images={data / 'images'}", "--device=cpu"]
    for form in sqa.FORMATS:
        assert run(data, *step, f"--prompt={form}", f"--out={out}", "--batch-size=4") == 0
        whole = out.read_bytes()
        rows = [json.loads(line) for line in whole.splitlines()]
        assert [row["question_id"] for row in rows] == list("651234") and {row["text"] for row in rows} == {"B"}
        assert [row["prompt"].startswith("<image>\n") for row in rows] == [False, False, False, True, True, True]
        assert all(row["prompt"].endswith("directly.") == (form == "CQM-A") for row in rows)
        out.write_bytes(whole[: len(whole) // 2])
        assert run(data, *step, f"--prompt={form}", f"--out={out}", "--batch-size=1") == 0
        assert out.read_bytes() == whole
        out.unlink()
    assert run(data, *step, f"--out={out}") == 0
    assert run(data, *step, f"--out={out}", "--prompt=CQM-A") == 2
    assert '"prompt"' in capsys.readouterr().err
    assert run(data, "score", f"--answers={out}") == 0
    assert cells(capsys.readouterr().out)["ours.jsonl"] == ["0.00"] * 9


# ---------------------------------------------------------------- what can be wrong


def mend(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


WRONG = [
    (lambda folder: (folder / "problems.json").unlink(), "problems.json: no such file; --data names the folder"),
    (lambda folder: (folder / "pid_splits.json").unlink(), "pid_splits.json: no such file; --data names the folder"),
    (cut("problems.json"), "problems.json: cannot be read as JSON"),
    (
        mend("pid_splits.json", lambda splits: splits.pop("test")),
        "has no list of ids for --split test; there are train",
    ),
    (mend("pid_splits.json", lambda splits: splits["test"].append("99")), "ids of the split test are missing: 1 (99)"),
    (mend("pid_splits.json", lambda splits: splits["test"].append("3")), "ids of test are there twice: 1 (3)"),
    (mend("problems.json", lambda raw: raw["3"].pop("hint")), 'problem 3: the field "hint" must not be None'),
    (mend("problems.json", lambda raw: raw["3"].update(answer=3)), 'problem 3: the field "answer" must not be 3'),
    (mend("problems.json", lambda raw: raw["3"].update(choices=list("abcdef"))), 'the field "choices" must not be'),
    (mend("problems.json", lambda raw: raw["3"].update(grade="grade13")), "the field \"grade\" must not be 'grade13'"),
    (mend("problems.json", lambda raw: raw["3"].update(grade="grade" + "1" * 5000)), 'the field "grade" must not be'),
    (mend("problems.json", lambda raw: raw["3"].update(answer=True)), 'the field "answer" must not be True'),
    (mend("problems.json", lambda raw: raw["3"].update(subject="art")), "the field \"subject\" must not be 'art'"),
    (mend("problems.json", lambda raw: raw.update({"3": []})), "problem 3: is no object"),
    (cut("ours.jsonl"), "ours.jsonl, line 5: is not whole JSON"),
    (lambda folder: (folder / "ours.jsonl").unlink(), "ours.jsonl: cannot be read"),
    (lambda folder: write_lines(folder / "ours.jsonl", {"7": "A"}), "ids that the split test does not have: 1 (7)"),
    (
        lambda folder: (folder / "ours.jsonl").write_text('{"question_id": 1, "text": "A"}\n' * 2),
        "question_id 1 is there twice",
    ),
]


@pytest.mark.parametrize(("damage", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_one_line(data, capsys, damage, message):
    write_lines(data / "ours.jsonl", TEXTS)
    damage(data)
    assert run(data, "score", f"--answers={data / 'ours.jsonl'}") == 2
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert message in errors and errors.startswith("error: ")


def test_more_that_can_be_wrong(data, capsys, scripted_model):
    write_lines(data / "ours.jsonl", TEXTS)
    assert run(data, "score", f"--answers={data / 'ours.jsonl'}", f"--judged={data / 'ours.jsonl'}") == 2
    assert "--teacher-answers" in capsys.readouterr().err
    checkpoint.save(scripted_model.says("B", positions=2000), data / "model")
    (data / "images" / "3" / "image.png").unlink()
    step = ["answer", data / "model", f"--images={data / 'images'}", f"--out={data / 'out.jsonl'}"]
    assert run(data, *step) == 2
    assert "1 of the images cannot be used" in capsys.readouterr().err and not (data / "out.jsonl").exists()
    assert run(data, "records", "--split=test", f"--out={data / 'nowhere' / 'train.json'}") == 2
    assert "train.json" in capsys.readouterr().err
    before = (data / "problems.json").read_bytes()
    assert run(data, "records", f"--out={data / 'problems.json'}") == 2
    assert "problems.json, which is read" in capsys.readouterr().err and (data / "problems.json").read_bytes() == before


def test_the_one_command_knows_its_parts(capsys):
    for words in ([], ["judge"], ["science-qa"], ["llava-bench", "answer"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    for command in ("llava-bench", "science-qa", "miniature"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    assert capsys.readouterr().out.count("usage: ") == 3
