"""The whole chain of `train.py miniature`, tiny, and the sums behind its table."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

import train
from nanollava.checkpoint import load
from nanollava.error import Error
from nanollava.evaluate import miniature as evaluation
from nanollava.miniature.language import KINDS, Question
from nanollava.miniature.recipe import Clock
from nanollava.miniature.scenes import Scene, Thing
from nanollava.miniature.world import Annotated
from nanollava.tokenizer import load_tokenizer
from nanollava.train.machine import in_processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    words = ["miniature", "--recipe", "smoke", "--out", str(folder / "run"), "--bundle", str(folder / "weights")]
    assert train.main(words) == 0
    return folder


def test_the_chain_leaves_every_part_and_a_table(finished):
    results = json.loads((finished / "run/results.json").read_text())
    for columns in (results["exact"], results["verdict"]):
        assert list(columns) == ["guessing", "language model alone", "after stage 1", "after stage 2", "blind"]
        assert all(set(column) == {*KINDS, "mean"} for column in columns.values())
    assert load(finished / "run/stage1").config.stage == "stage1"
    assert load(finished / "run/stage2").config.stage == "stage2"
    assert "| kind |" in (finished / "weights/README.md").read_text()


def test_a_finished_chain_is_not_trained_again_and_a_missing_part_is(finished, capsys):
    before = (finished / "run/stage1/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(finished / "run/stage2")
    (finished / "run/stage2").mkdir()  # an empty folder is no finished stage
    assert train.main(["miniature", "--recipe", "smoke", "--out", str(finished / "run")]) == 0
    assert (finished / "run/stage1/model.safetensors").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "python train.py stage2" in printed and "python train.py stage1" not in printed


def test_ctrl_c_in_a_stage_is_answered_once_and_the_same_command_goes_on(finished, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    shutil.rmtree(finished / "run/stage2")
    words = ["miniature", "--recipe", "smoke", "--out", str(finished / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        assert train.main(words) == 130
    assert capsys.readouterr().err.strip() == "interrupted: go on with the same command"
    assert train.main(words) == 0


def test_ctrl_c_while_the_world_is_drawn_is_answered_once(tmp_path):
    """The terminal sends it to the processes that draw as well."""
    process = subprocess.Popen(
        [sys.executable, train.__file__, "miniature", "--out", str(tmp_path / "run")], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # or deaf to it, if these tests are
    )  # fmt: skip
    while process.poll() is None and not any((tmp_path / "run").glob("world/images/train/*.png")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1].strip() == "interrupted: go on with the same command"
    assert process.returncode == 130


def test_an_error_in_a_stage_is_one_line(finished, monkeypatch, capsys):
    def refused(*_):
        raise Error("no space left")

    shutil.rmtree(finished / "run/stage2")
    monkeypatch.setattr(train, "train", refused)
    assert train.main(["miniature", "--recipe", "smoke", "--out", str(finished / "run")]) == 2
    assert capsys.readouterr().err == "error: no space left\n"


def test_steps_of_another_recipe_are_not_taken_for_this_ones(finished, capsys):
    assert train.main(["miniature", "--recipe", "demo", "--out", str(finished / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {finished / 'run'} holds a run with other numbers or of another version")
    assert "recipe.json" in said
    (finished / "run/recipe.json").rename(finished / "recipe.json")
    assert train.main(["miniature", "--recipe", "smoke", "--out", str(finished / "run")]) == 2
    (finished / "recipe.json").rename(finished / "run/recipe.json")


def test_a_job_that_fails_ends_the_others_and_says_which_it_was(capfd):
    jobs = {"slow": (time.sleep, (600,)), "bad": (load_tokenizer, ("nowhere",))}
    with pytest.raises(Error, match="bad failed"):
        in_processes(jobs)
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == "error: nowhere: no such folder; give one that holds a tokenizer.model\n"


def test_jobs_are_deaf_to_ctrl_c_before_they_can_ask_for_it(heeding_ctrl_c, monkeypatch):
    """While Python starts and imports; the terminal sends it to them too."""
    kind, answers = multiprocessing.get_context("spawn").Process, []
    start = kind.start
    monkeypatch.setattr(kind, "start", lambda job: answers.append(signal.getsignal(signal.SIGINT)) or start(job))
    in_processes({"short": (time.sleep, (0,))})
    assert answers == [signal.SIG_IGN] and signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_folders_that_cannot_be_written_are_said_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/poem.txt").write_text("mine")
    new = ["--out", tmp_path / "new", "--bundle"]
    for name, words in (("file", ["--out", tmp_path / "file"]), ("file", [*new, tmp_path / "file"]),
                        ("folder", [*new, tmp_path / "folder"])):  # fmt: skip
        assert train.main(["miniature", "--recipe", "smoke", *map(str, words)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {tmp_path / name}") and printed.out == ""


@pytest.mark.parametrize("bundle", ["out", "out/clip", "."])
def test_the_weights_to_give_away_lie_apart_from_the_run(bundle, tmp_path, capsys):
    words = ["miniature", "--recipe", "smoke", "--out", tmp_path / "out", "--bundle", tmp_path / bundle]
    assert train.main([*map(str, words)]) == 2
    assert "choose folders apart" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_clock_counts_what_was_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), Clock(tmp_path / "times.json").step("stage 2", "title"):
        raise KeyboardInterrupt
    before = json.loads((tmp_path / "times.json").read_text())["stage 2"]
    assert before > 0
    with Clock(tmp_path / "times.json").step("stage 2", "title"):
        pass
    assert json.loads((tmp_path / "times.json").read_text())["stage 2"] > before


@pytest.mark.parametrize("damaged", ["[]", '{"stage 2": "long"}', "{", "\xff"])
def test_damaged_times_are_named(damaged, tmp_path):
    (tmp_path / "times.json").write_text(damaged, encoding="latin-1")
    with pytest.raises(Error, match=r"times\.json"):
        Clock(tmp_path / "times.json")


def test_test_questions_are_spread_evenly_and_blind_images_show_another_scene(finished):
    items = evaluation.make_items(finished / "run/world", per_kind=12)
    for kind in KINDS:
        counts = Counter(len(item.image.scene.things) for item in items if item.question.kind == kind)
        assert counts == ({2: 6, 3: 6} if kind in evaluation.NOT_ALONE else {1: 4, 2: 4, 3: 4})
    assert all(item.other.scene != item.image.scene for item in items)
    assert all(item.image.scene.split == "test" for item in items)


def made_record(wordings: list[str], forms: list[str]) -> dict:
    return {"id": "1", "kind": "conversation", "conversations": [], "wordings": wordings, "forms": forms}


def test_guessing_answers_each_wording_with_its_most_frequent_form(tmp_path):
    forms = ["{it} is large.", "{it} is small.", "{it} is small."]
    records = [made_record(["How big is {it}?"], [form]) for form in forms]
    (tmp_path / "instruct.json").write_text(json.dumps(records))
    image = Annotated(1, "x.png", [], Scene((Thing(0, "large", "red", "star"),)))
    star = {"it": "the star"}
    known = evaluation.Item(image, image, Question("size", "How big is {it}?", "{it} is large.", star))
    unknown = evaluation.Item(image, image, Question("size", "never seen", "{it} is large.", star))
    assert evaluation.guesses(tmp_path, [known, unknown]) == ["The star is small.", ""]


def test_a_verdict_is_guessed_and_counted_without_its_evidence(tmp_path):
    """Three answers of five end in yes, each with other evidence; the most frequent whole form ends in no."""
    forms = [f"I see a {colour} star. {{it}}? yes." for colour in ("pink", "red", "blue")]
    forms += 2 * ["I see a cross. {it}? no."]
    records = [made_record(["Is there {it}?"], [form]) for form in forms]
    (tmp_path / "instruct.json").write_text(json.dumps(records))
    image = Annotated(1, "x.png", [], Scene((Thing(0, "large", "red", "star"),)))
    question = Question("existence", "Is there {it}?", forms[1], {"it": "a star"})
    item = evaluation.Item(image, image, question)
    assert evaluation.guesses(tmp_path, [item]) == ["I see a cross. A star? No."]
    assert evaluation.guesses(tmp_path, [item], evaluation.verdict) == ["Yes"]
    right = [evaluation.Item(image, image, Question(kind, "", forms[1], {"it": "a star"})) for kind in KINDS]
    texts = ["Yes"] * len(KINDS)
    assert evaluation.accuracy(right, texts)["mean"] == 0
    assert evaluation.accuracy(right, texts, evaluation.verdict)["mean"] == 1


@pytest.mark.parametrize("answer, comes_down_to", [
    ("The star is red.", "the star is red"),
    ("The star is small and red, at the top left.", "at the top left"),
    ("Looking for stars, I see a red star, so one.", "so one"),
    ("I see a red star. A red star? Yes.", "yes"),
    ("The red object is a star on the left; below it is a star, which is blue.", "which is blue"),
])  # fmt: skip
def test_an_answer_s_verdict_is_its_last_clause(answer, comes_down_to):
    assert evaluation.verdict(answer) == comes_down_to


def test_each_column_is_asked_of_its_own_model_about_its_own_image(finished, monkeypatch):
    """A stand-in for models: right where it is shown the question's own image and is the second of the two."""
    world, models = finished / "run/world", {"after stage 1": "one", "after stage 2": "two"}
    items = evaluation.make_items(world, per_kind=12)
    right = {(item.question.text, item.image.id): item.question.answer for item in items}
    others = [(item.question.text, item.other.id) for item in items if item.question.kind in KINDS]
    asked = []

    def stand_in(model, folder, questions, template):
        questions = [(text, image and image.id) for text, image in questions]
        asked.append((model, {image for _, image in questions}))
        return [right.get(question, "") if model == "two" else "" for question in questions]

    monkeypatch.setattr(evaluation, "answers", stand_in)
    scores = evaluation.evaluate(models, world, per_kind=12)
    assert [model for model, _ in asked] == ["one", "one", "two", "two", "two"] and asked[0][1] == {None}
    assert asked[3][1] == {image for _, image in others}
    exact = scores["exact"]
    assert exact["after stage 2"]["mean"] == 1 and exact["after stage 1"]["mean"] == 0 and exact["blind"]["mean"] < 0.2
    assert scores["detail"] == {"things": 1, "things and places": 1}


def test_captions_are_held_against_their_own_image_and_the_next_one_s(finished, monkeypatch):
    world = finished / "run/world"
    images = evaluation.read_split(world, "test")[:5]
    told = [" ".join(thing.name for thing in image.scene.things) for image in images]
    monkeypatch.setattr(evaluation, "answers", lambda *_: told)
    own, others = evaluation.caption_f1(None, world, count=5)
    assert own == 1 and others < 0.8


def test_one_model_is_evaluated_from_the_command_line(finished, capsys):
    words = [str(finished / "weights"), "--world", str(finished / "run/world"), "--questions", "6"]
    assert evaluation.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("| kind | guessing | language model alone | model | blind |") == 2
    assert evaluation.main([str(finished / "nowhere"), *words[1:]]) == 2
    assert evaluation.main([words[0], "--world", str(finished)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and all(line.startswith(f"error: {finished}") for line in error)
    for number in ("0", "1001"):
        assert evaluation.main([*words[:-1], number]) == 2
        assert capsys.readouterr().err.startswith(f"error: --questions {number}: ")


def test_f1_by_hand():
    told = [Counter(["red", "star"]), Counter(["blue"])]
    true = [Counter(["red", "circle", "large"]), Counter(["blue"])]
    assert evaluation.f1(told, true) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


def test_descriptions_are_scored_as_exact_sets():
    things = (Thing(0, "large", "red", "star"), Thing(8, "small", "blue", "heart"))
    image = Annotated(1, "x.png", [], Scene(things))
    item = evaluation.Item(image, image, Question("detail", "", "", {}))
    right = "There is a small blue heart at the bottom right. There is a large red star at the top left."
    moved = right.replace("bottom right", "bottom left")
    texts = [right, moved, right + " There is a small red cross at the top.", "There is a large red star."]
    scores = evaluation.describe_scores([item] * 4, texts)
    assert scores == {"things": 2 / 4, "things and places": 1 / 4}
