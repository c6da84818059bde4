"""The checker of record files: counts by hand, and never another verdict than training's.

``train.read_groups`` is what training itself calls; what it prints, refuses and leaves is the oracle.
"""

import argparse
import ast
import collections
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from nanollava import checkpoint, config, images
from nanollava.conversation import TEMPLATES, messages_from_record
from nanollava.error import Error
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.progress import progress
from nanollava.tokenizer import Tokenizer
from nanollava.train import check
from nanollava.train.check import DECODED, REFUSED, Words, main
from nanollava.train.records import LOSSES, Reader, has_spare_turn
from nanollava.train.stages import STAGES
from nanollava.vit import VisionConfig

ROW = 200  # positions; an image has 4


def record(name: object, image: object, *turns: str, roles: tuple[str, ...] = ("human", "gpt")) -> dict:
    conversations = [{"from": roles[i % len(roles)], "value": text} for i, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


# One or more of each kind, with the kinds that are found in it.
LONG = "word " * ROW
CASES = [
    (record("good", "a.png", "<image>\nWhat?", "A star."), ()),
    (record("good", "b.png", "<image>\nWhat?", "A ball."), ()),  # ids may come twice
    (record("text", None, "What?", "A star."), ()),
    (record("form1", None), ("no record",)),
    ("a text", ("no record",)),
    ({"id": "form3", "conversations": [{"from": "human"}]}, ("no record",)),
    (record("form4", None, "What?", "Who?", "A.", roles=("human", "system", "gpt")), ("no record",)),
    (record("mute", "a.png", "<image>\nWhat?"), ("no answer",)),
    (record("roles1", None, "A?", "B?", "C.", roles=("human", "human", "gpt")), ("roles out of order",)),
    (record("roles2", None, "A?", "B.", "C.", roles=("human", "gpt", "gpt")), ("roles out of order",)),
    (record("empty1", None, "A?", " \n"), ("empty answer",)),
    (record("empty2", "a.png", "<image> A?", "B.", "C?", "<image>"), ("empty answer",)),
    (record("marks1", None, "<image>\nA?", "B."), ("marks",)),
    (record("marks2", ["a.png", "b.png"], "<image>\nA?", "B."), ("marks",)),
    (record("room", ["a.png"] * 50, "<image>" * 50, "B."), ("no room",)),
    (record("name1", "../a.png", "<image>\nA?", "B."), ("image name",)),
    (record("name2", 7, "What?", "B."), ("image name",)),
    (record("gone1", "nowhere.png", "<image>\nA?", "B."), ("image missing",)),
    (record("gone2", ["a.png", "nowhere.png"], "<image><image>\nA?", "B."), ("image missing",)),
    (record("zero", "zero.png", "<image>\nA?", "B."), ("image unreadable",)),
    (record("prose", "text.png", "<image>\nA?", "B."), ("image unreadable",)),
    (record("folder", "folder.png", "<image>\nA?", "B."), ("image unreadable",)),
    (record("cut", None, "A?", LONG), ("cut",)),
    (record("lost", None, LONG, "B."), ("cut", "lost")),
    (record("blind", "nowhere.png", "A?", "B."), ("unmarked",)),
    (record("spare1", None, "Hello.", "A?", "B.", roles=("gpt", "human", "gpt")), ("spare",)),
    (record("spare2", None, "A?", "B.", "C?"), ("spare",)),
    (record("several", "a.png", "Hello.", "A?", LONG, "C?", roles=("gpt", "human")), ("cut", "unmarked", "spare")),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Good pictures, and what else may lie in a folder of pictures."""
    shelf = tmp_path_factory.mktemp("shelf")
    for name in ("a.png", "b.png"):
        Image.effect_noise((30, 20), 50).convert("RGB").save(shelf / name)
    (shelf / "zero.png").touch()
    (shelf / "text.png").write_text("not a picture")
    (shelf / "folder.png").mkdir()
    content = (shelf / "a.png").read_bytes()
    (shelf / "half.png").write_bytes(content[: len(content) // 2])
    return shelf


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_file) -> Path:
    """A LLaVA of 4 patches."""
    folder = tmp_path_factory.mktemp("model") / "llava"
    vision = VisionConfig(16, 8, 16, 16, 2, 2)
    settings = LlavaConfig(vision, LlamaConfig(400, 32, 16, 2, 2, 1), max_length=ROW)
    checkpoint.save(Llava(settings, Tokenizer(tiny_tokenizer_file)), folder)
    return folder


@pytest.fixture
def checked(tmp_path, shelf, folder, capsys):
    """A function: records and options -> exit status, counts by the words of the kinds, and all that was printed."""

    def checked(records: list, *words: object, model: bool = True, images: bool = True):
        file = tmp_path / "records.json"
        file.write_text(json.dumps(records))
        more = [*(("--images", shelf) if images else ()), *(("--model", folder) if model else ()), *words]
        status = main(["check", str(file), *map(str, more)])
        printed = capsys.readouterr()
        assert not printed.err or status == 2
        return status, counts(printed.out), printed.out

    return checked


def counts(table: str) -> dict[str, int]:
    """Kind -> number, of the lines of the table."""
    found = {}
    for kind, words in (REFUSED | LOSSES | DECODED).items():
        line = [line for line in table.splitlines() if line.startswith(f"  {words} ")]
        if line:
            found[kind] = int(line[0][2 + len(words) :].split()[0].replace(",", ""))
    return found


def by_hand(cases: list[tuple[object, tuple[str, ...]]]) -> dict[str, int]:
    tally = collections.Counter(kind for _, kinds in cases for kind in kinds)
    return {kind: tally[kind] for kind in (REFUSED | LOSSES)}


# ---------------------------------------------------------------- counts by hand


def test_each_case_is_what_it_is_meant_to_be(checked):
    for case, kinds in CASES:
        status, found, _ = checked([case])
        assert {kind for kind, number in found.items() if number} == set(kinds), case
        assert status == bool(kinds)


def test_one_file_of_every_kind(checked):
    """All that can be met with an image folder, under a template that takes conversations, is met at least once."""
    status, found, printed = checked([case for case, _ in CASES])
    assert status == 1 and found == by_hand(CASES)
    assert {kind for kind, number in found.items() if not number} == {"plain", "no image folder"}
    concerned = sum(bool(kinds) for _, kinds in CASES)
    assert f"{len(CASES)} records; something was found in {concerned} of them" in printed
    lines = {line.split("  ")[1]: line for line in printed.splitlines() if line.startswith("  ")}
    place = {str(case.get("id")): n for n, (case, _) in enumerate(CASES) if isinstance(case, dict)}
    roles, form, cut = (
        [name if name == "number 4" else f"{name} (number {place[name]})" for name in names]
        for names in (("roles1", "roles2"), ("form1", "number 4", "form3", "form4"), ("cut", "lost", "several"))
    )
    assert lines[REFUSED["roles out of order"]].endswith(f" 2  {', '.join(roles)}")
    assert lines[REFUSED["no record"]].endswith(f" 4  {', '.join(form)}")
    assert lines[LOSSES["cut"]].endswith(f" 3  {', '.join(cut)}")
    assert "exact, with the tokenizer of" in printed and "rows of 200 positions, 4 for an image, vicuna_v1" in printed


def test_nothing_found_is_status_0(checked):
    good = [case for case, kinds in CASES if not kinds]
    status, found, printed = checked(good)
    assert status == 0 and set(found.values()) == {0} and "3 records; something was found in 0" in printed


def test_the_first_few_ids_are_shown_of_many(checked):
    many = [record(f"n{number}", None, "A?", " ") for number in range(7)]
    many[0]["id"], many[1]["id"] = "two\nlines", "x" * 200
    _, found, printed = checked(many)
    (line,) = [line for line in printed.splitlines() if "an answer is empty" in line]
    assert found["empty answer"] == 7 and line.endswith(
        f"two\\nlines (number 0), {'x' * 30} ... (number 1), n2 (number 2), n3 (number 3), n4 (number 4), ..."
    )


def test_captions_by_the_template_of_stage_1(checked):
    talk = record("talk", "a.png", "<image>\nA?", "B.", "C?", "D.")
    text = record("text", None, "A?", "B.")
    good = record("good", "a.png", "<image>\nSay.", "B.")
    status, found, printed = checked([talk, text, good], "--template", "plain")
    assert status == 1 and found["plain"] == 2 and sum(found.values()) == 2 and "plain" in printed
    assert checked([talk, text, good])[0] == 0


def test_without_a_folder_images_are_named_as_training_does(checked):
    status, found, _ = checked([CASES[0][0], CASES[2][0]], images=False)
    assert status == 1 and found["no image folder"] == 1 and sum(found.values()) == 1


# ---------------------------------------------------------------- agreement with training


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_checker_and_training_agree_on_random_mixtures(stage, seed, checked, shelf, folder, tmp_path, capsys):
    rng = random.Random(seed)
    mixture = [case for case, _ in rng.choices(CASES, k=rng.randint(1, 40))]
    model, template = checkpoint.load(folder), STAGES[stage].template
    status, found, _ = checked(mixture, "--template", template)
    args = argparse.Namespace(images=shelf, skip_bad=True, dry_run=True, share_images=False, out=None, val=None)
    try:
        trained = len(train.read_groups(tmp_path / "records.json", args, model, STAGES[stage]))
    except Error as error:
        assert "nothing to learn" in str(error)
        trained = 0
    printed = capsys.readouterr()
    refused = sum(found[kind] for kind in REFUSED)
    listed = [line for line in printed.err.splitlines() if line.startswith("  record ")]
    more = re.search(r"and (\d+) more", printed.err)
    assert len(listed) + int(more[1] if more else 0) == refused
    assert trained == len(mixture) - refused - found["lost"]
    assert f"{len(mixture)} records read" in printed.out and f"; {trained} to train on" in printed.out
    for kind, words in LOSSES.items():
        line = re.search(rf"^  {re.escape(words)}: (\d+) ", printed.out, re.MULTILINE)
        assert (int(line[1]) if line else 0) == found[kind]
    assert status == bool(refused or any(found[kind] for kind in LOSSES))


@pytest.mark.parametrize("number", [1, 2])
def test_train_py_names_what_it_leaves_out(number, trainer, shelf, tmp_path, capsys):
    """As it is typed: a run without refusals, in which nothing that a record loses stays unsaid."""
    cases = [record("good", "a.png", "<image>\nA?", "B."), record("lost1", "a.png", "<image>\nA?", LONG)]
    if number == 2:
        cases += [case for case, _ in CASES if isinstance(case, dict) and case["id"] in ("lost", "blind", "spare2")]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(cases))
    words = ("--images", shelf, "--steps", 1, "--max-length", ROW)
    assert trainer.stage(number, file, tmp_path / "out", *words) == 0
    printed = capsys.readouterr().out
    assert f"  {LOSSES['cut']}: {number} (lost1{', lost' * (number - 1)})" in printed
    for kind, name in (("lost", "lost"), ("unmarked", "blind"), ("spare", "spare2")):
        assert (f"  {LOSSES[kind]}: 1 ({name})" in printed) == (number == 2)


def test_a_turn_is_spare_where_the_messages_are_fewer_than_the_turns():
    for case, _ in CASES:
        try:
            messages = messages_from_record(case)
        except Error:
            continue
        assert has_spare_turn(case) == (len(messages) < len(case["conversations"]))


def test_errors_of_records_have_a_kind_that_the_table_knows():
    """Every literal kind in the sources is a row of the table, and every row but that of decoding is met in CASES, or
    in the tests of the template and of the missing folder."""
    root = Path(check.__file__).parents[1]
    sources = [root / name for name in ("conversation.py", "images.py", "train/records.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source.read_text()))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Error"]
    kinds = [kind for call in calls for kind in (call.args[1:] + [word.value for word in call.keywords])]
    literal = {kind.value for kind in kinds if isinstance(kind, ast.Constant)}
    assert literal | {"image missing", images.UNREADABLE} == set(REFUSED | DECODED)


# ---------------------------------------------------------------- lengths


def test_words_are_a_lower_bound(tiny_tokenizer_file):
    """Of every tokenizer: no text has fewer tokens than words, whatever the template puts around it."""
    rng, tokenizer = random.Random(0), Tokenizer(tiny_tokenizer_file)
    pieces = ["word", "A", "<image>", "\n", "  ", "犬", "\t", "é", "</s>", "###", "\u2003", "it's", "12:45"]
    settings = LlavaConfig(VisionConfig(16, 8), max_length=60)
    for name in TEMPLATES:
        for _ in range(60):
            texts = [" ".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(4)]
            case = record("x", "a.png", *texts[: 2 if name == "plain" else 4])
            readers = [Reader(None, t, settings, name, seen={"a.png": ("", "")}) for t in (Words(), tokenizer)]
            few, many = (reader.read(case) for reader in readers)
            least, exact = ({finding.kind for finding in reader.report.findings} for reader in readers)
            if few is not None and many is not None:
                assert len(few.token_ids) <= len(many.token_ids)
            assert least & {"cut", "lost", "no room"} <= exact or "no room" in exact


def test_no_piece_of_the_genuine_vocabulary_holds_two_words(llama_tokenizer_file):
    tokenizer = Tokenizer(llama_tokenizer_file)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    assert len(pieces) == 32_000 and max(len(piece.split()) for piece in pieces) == 1


def test_without_a_model_rows_are_v15s_and_words_count(checked):
    """System prompt of v1: 25 words; USER: question; ASSISTANT: answer and end token. Worked by hand."""
    system = len(TEMPLATES["vicuna_v1"].system.split())
    room = 2048 - (1 + system + 2 + 1)  # begin token, USER:, ASSISTANT:, end token
    fits, cut = (record(name, None, "Q", "w " * (room - 1 + more)) for name, more in (("fits", 0), ("cut", 1)))
    lost = record("lost", None, "w " * (room + 1), "A")
    pictures = ["a.png"] * 4
    room_for_three = record("three", pictures[:3], "<image> " * 3, "A")
    four = record("four", pictures, "<image> " * 4, "A")
    status, found, printed = checked([fits, cut, lost, room_for_three, four], model=False)
    named = {kind: number for kind, number in found.items() if number}
    assert status == 1 and named == {"cut": 2, "lost": 1, "no room": 1}
    assert "a lower bound, each word one token; rows of 2,048 positions, 576 for an image" in printed
    assert checked([fits], "--max-length", 2047, model=False)[1]["cut"] == 1


def test_the_row_of_the_model_and_another_one(checked, folder):
    fits = record("x", None, "A?", "B.")
    assert checked([fits])[0] == 0
    status, found, printed = checked([fits], "--max-length", 5)
    assert status == 1 and found["lost"] == 1 and "rows of 5 positions" in printed


def test_a_language_folder_counts_too(checked, trainer, tiny_tokenizer_file, tmp_path):
    """A Vicuna folder, one with a tokenizer alone, and a CLIP folder for the patches."""
    fits = record("x", "a.png", "<image>\nA?", "B.")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(tiny_tokenizer_file.read_bytes())
    for place in (trainer.vicuna, tmp_path / "tokenizer"):
        printed = checked([fits], "--model", place, model=False)[2]
        guess = "exact, but for images (--vision FOLDER tells their size), with the tokenizer of"
        assert f"{guess} {place}; rows of 2,048 positions, 576 for an image" in printed
    printed = checked([fits], "--model", trainer.vicuna, "--vision", trainer.clip, model=False)[2]
    assert "2,048 positions, 4 for an image" in printed


# ---------------------------------------------------------------- images read whole


def test_damage_behind_a_header_is_found_where_images_are_decoded(checked):
    cases = [record(name, "half.png", "<image>\nA?", "B.") for name in ("one", "two")]
    cases += [case for case, kinds in CASES]
    _, headers, printed = checked(cases)
    assert "image damaged" not in headers and headers == by_hand(CASES) and "by their headers" in printed
    status, whole, printed = checked(cases, "--decode")
    assert status == 1 and whole == by_hand(CASES) | {"image damaged": 2} and "read whole" in printed
    assert checked([CASES[0][0]], "--decode")[0] == 0


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere.json",), "nowhere.json: cannot be read"),
        (("half.json",), "half.json: is not whole JSON"),
        (("object.json",), "object.json: must be a JSON array"),
        (("good.json", "--max-length", "0"), "--max-length is 0: it must be above 0"),
        (("good.json", "--max-length", str(config.LARGEST + 1)), "--max-length is"),
        (("good.json", "--model", "nowhere"), "nowhere"),
        (("good.json", "--vision", "nowhere"), "nowhere"),
        (("good.json", "--model", "silent"), "no tokenizer.model in it"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_status_2(words, told, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.json").write_text(json.dumps([CASES[2][0]]))
    (tmp_path / "half.json").write_text('[{"id": ')
    (tmp_path / "object.json").write_text('{"id": 1}')
    (tmp_path / "silent").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "silent" / name).write_bytes((folder / name).read_bytes())
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1


def test_as_it_is_typed(shelf, tmp_path):
    """python -m nanollava.train.data check, in a process of its own."""
    file = tmp_path / "records.json"
    file.write_text(json.dumps([case for case, _ in CASES]))
    command = [sys.executable, "-m", "nanollava.train.data", "check", str(file), "--images", str(shelf)]
    root = Path(check.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 1 and done.stderr == "" and f"{len(CASES)} records" in done.stdout


def test_help_tells_the_command_and_its_options(capsys):
    for words, told in ((["--help"], "check"), (["check", "--help"], "--decode")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and told in printed and "python -m nanollava.train.data" in printed


def test_ctrl_c_is_status_130(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "read", interrupted)
    (tmp_path / "good.json").write_text(json.dumps([CASES[2][0]]))
    assert main(["check", str(tmp_path / "good.json")]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_long_work_tells_how_far_it_is(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 11.0, 15.0, 25.0, 30.0])
    monkeypatch.setattr("nanollava.progress.time.perf_counter", lambda: next(clock))
    assert list(progress("abcd", 4, "letters")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "1 of 4 letters, about 33 s left",
        "3 of 4 letters, about 8 s left",
    ]
