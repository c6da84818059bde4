"""The paper's findings in miniature: what each variant changes, what stays the same, how it is scored and compared."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import train
from nanollava.checkpoint import load
from nanollava.evaluate import ablations, findings, variants
from nanollava.evaluate.__main__ import main
from nanollava.evaluate.variants import KEPT, TURNED, VARIANTS, chosen, conclusion_first, turned
from nanollava.miniature import pretrain, recipe, world
from nanollava.miniature.language import KINDS, ask, describe
from nanollava.miniature.scenes import random_scene

SMALL = recipe.Recipe(world.WorldSize(80, 12, 60, 40, records=4), 2, 2, 2, 2, per_kind=2)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    """All that the variants share, as train.py miniature leaves it."""
    folder = tmp_path_factory.mktemp("miniature")
    recipe.keep_to(SMALL, folder)
    world.build(folder / "world", SMALL.size)
    tokenizer = pretrain.train_tokenizer(folder / "world", folder / "tokenizer")
    pretrain.pretrain_vision(folder / "world", folder / "clip", tokenizer, SMALL.clip_steps)
    pretrain.pretrain_language(folder / "world", folder / "vicuna", tokenizer, SMALL.language_steps)
    (folder / "world/done").touch()
    return folder


def words(miniature: Path, out: Path, *more: object) -> list[str]:
    told = ["--miniature", miniature, "--out", out, "--seeds", 1, "--steps", 2, "--at-once", 1, *more]
    return [str(word) for word in told]


@pytest.fixture(scope="module")
def finished(miniature, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ablations")
    assert main(["ablations", *words(miniature, out)]) == 0
    return out


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- the runs


def test_each_variant_changes_one_thing_and_all_do_the_same_number_of_steps(finished):
    folders = {name: finished / "seed-0" / name for name, variant in VARIANTS.items() if variant.records}
    assert set(VARIANTS) - set(folders) == {"none"} and not (finished / "seed-0/none").exists()
    configs = {name: load(folder).config for name, folder in folders.items()}
    for name, config in configs.items():
        assert config.select_layer == (-1 if name == "last-layer" else -2)
        assert config.projector_type == ("linear" if name == "linear" else "mlp2x_gelu")
        assert (config.language == configs["all"].language) == (name != "half-size")
        assert config.stage == "stage2" and config.max_length == 256
        assert len((folders[name] / "metrics.jsonl").read_text().splitlines()) == 2
    weights = {(folder / "model.safetensors").read_bytes() for folder in folders.values()}
    assert len(weights) == len(folders)


def test_variants_that_differ_in_stage_2_alone_share_stage_1(finished):
    starts = {folder.name for folder in (finished / "seed-0").glob("stage1*")}
    assert starts == {"stage1", "stage1-linear", "stage1-last-layer", "stage1-half-size"}


def test_the_half_size_language_model_has_half_the_parameters(finished):
    all_of_it, half = (
        sum(p.numel() for p in load(finished / "seed-0" / name).language.parameters()) for name in ("all", "half-size")
    )
    assert 0.45 < half / all_of_it < 0.55


def test_the_report_has_both_tables_a_line_for_each_variant_and_a_picture(finished):
    text = (finished / "results.md").read_text()
    for name, variant in VARIANTS.items():
        assert text.count(f"| {variant.title} | ") == (2 if name == "all" else 5 if name in findings.BENCH else 2)
    assert "| guessing |" in text and "blind |" in text and "fewer than three seeds" in text
    results = json.loads((finished / "results.json").read_text())
    assert set(results["runs"]) == set(results["summary"]) == set(VARIANTS)
    assert results["setting"]["steps"] == 2
    assert Image.open(finished / "results.png").size[0] > 500


def test_what_is_finished_is_not_done_again_and_more_seeds_are_added(miniature, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = (out / "results.md").read_text()
    assert main(["ablations", *words(miniature, out)]) == 0
    assert "python train.py" not in capsys.readouterr().out and (out / "results.md").read_text() == before
    assert main(["ablations", *words(miniature, out, "--only", "none"), "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 seeds" in (out / "results.md").read_text() and printed.count("python train.py stage2") == 1
    assert "--seed 1" in printed and not same_weights(out / "seed-0/all", out / "seed-1/all")


def test_interrupted_anywhere_the_same_command_goes_on_to_the_same_end(
    miniature, finished, tmp_path, monkeypatch, capsys
):
    given = words(miniature, tmp_path / "out", "--only", "answer-first")
    for last in (1, 2):
        calls = []

        def command(argv, calls=calls, last=last):
            calls.append(argv)
            if len(calls) == last:
                raise KeyboardInterrupt
            train.run(argv)

        with monkeypatch.context() as patch:
            patch.setattr(ablations, "train_command", lambda command=command: command)
            assert main(["ablations", *given]) == 130
        assert capsys.readouterr().err.strip() == "interrupted: the same command goes on where it stopped"
        assert len(calls) == last
    assert main(["ablations", *given]) == 0
    for name in ("all", "answer-first"):
        assert same_weights(tmp_path / "out/seed-0" / name, finished / "seed-0" / name)
    runs = [json.loads((out / "results.json").read_text())["runs"] for out in (tmp_path / "out", finished)]
    assert runs[0] == {name: runs[1][name] for name in runs[0]} and len(runs[0]) == 2


def test_killed_in_the_middle_it_goes_on(miniature, tmp_path, capsys):
    given = words(miniature, tmp_path / "out", "--only", "none")
    process = subprocess.Popen(
        [sys.executable, "-m", "nanollava.evaluate", "ablations", *given], stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(train.__file__).parent,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "out/seed-0/stage1/config.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/results.md").exists()
    assert main(["ablations", *given]) == 0
    assert "python train.py stage1" not in capsys.readouterr().out
    assert load(tmp_path / "out/seed-0/all").config.stage == "stage2"
    assert not list((tmp_path / "out").rglob("*.saving"))


# ---------------------------------------------------------------- the records


def records(kinds: dict[str, int]) -> list[dict]:
    return [{"id": f"{kind}-{i}", "kind": kind} for kind, count in kinds.items() for i in range(count)]


def test_kinds_are_left_out():
    full = records({"conversation": 2, "detail": 1, "reasoning": 2})
    kept = {
        name: [record["id"] for record in chosen(full, name)] for name in ("all", "detail+reasoning", "conversation")
    }
    assert kept["all"] == ["conversation-0", "conversation-1", "detail-0", "reasoning-0", "reasoning-1"]
    assert kept["detail+reasoning"] == ["detail-0", "reasoning-0", "reasoning-1"]
    assert kept["conversation"] == ["conversation-0", "conversation-1"]


def test_shares_are_those_of_the_paper_and_hang_on_the_id_alone():
    full = records({"conversation": 3000, "detail": 3000, "reasoning": 3000})
    kept = chosen(full, "mostly-conversation")
    counts = Counter(record["kind"] for record in kept)
    assert counts["conversation"] == 3000 and 110 < counts["detail"] < 190 and 250 < counts["reasoning"] < 350
    assert chosen(full[::-1], "mostly-conversation") == kept[::-1]


@pytest.mark.parametrize("answer, said_first, comes_down_to", [
    ("The star is red.", "The star is red.", "the star is red"),  # colour
    ("The red object is a star.", "The red object is a star.", "the red object is a star"),  # shape
    ("The star is large.", "The star is large.", "the star is large"),  # size
    ("The star is small, red and at the top.", "The star is small, red and at the top.", "red and at the top"),  # place
    ("Looking for stars, I see a red star, so one.", "One. Looking for stars, I see a red star.", "one"),  # count
    ("Looking for stars, I see none.", "None. Looking for stars, I see none.", "none"),
    (
        "Looking for objects, I see a red star, a pink heart and a blue cross, so three.",
        "Three. Looking for objects, I see a red star, a pink heart and a blue cross.", "three",
    ),
    (  # existence
        "Looking for stars, I see a red star. Blue? No.", "Blue? No. Looking for stars, I see a red star.", "no",
    ),
    ("Looking for stars, I see none, so no.", "No. Looking for stars, I see none.", "no"),
    ("Looking for stars, I see a red star, so yes.", "Yes. Looking for stars, I see a red star.", "yes"),
    (  # relation
        "The star is small, red and at the top; the heart is large, blue and on the left; so the star is above.",
        "The star is above. The star is small, red and at the top; the heart is large, blue and on the left.",
        "the star is above",
    ),
    (
        "The star is red and at the top; the heart is on the left; so the star is to the right. To the left? No.",
        "To the left? No. The star is red and at the top; the heart is on the left; so the star is to the right.", "no",
    ),
    (  # neighbour
        "The star is small, red and at the top; below it is the blue object, which is a heart.",
        "It is a heart. The star is small, red and at the top; below it is the blue object.", "a heart",
    ),
    (
        "The star is small, red and at the top; below it is the large heart, which is blue.",
        "It is blue. The star is small, red and at the top; below it is the large heart.", "blue",
    ),
    (  # remaining
        "Without the red objects, the blue star and the pink cross would be left, so two.",
        "Two. Without the red objects, the blue star and the pink cross would be left.", "two",
    ),
    ("Without the stars, nothing would be left, so none.", "None. Without the stars, nothing would be left.", "none"),
    (  # detail
        "The image shows two objects. There is a small red star at the top. There is a large blue cross on the left.",
        "The image shows two objects. There is a small red star at the top. There is a large blue cross on the left.",
        "the image shows two objects",
    ),
])  # fmt: skip
def test_an_answer_is_turned_round_and_its_verdict_found(answer, said_first, comes_down_to):
    assert conclusion_first(answer) == said_first
    assert variants.first_verdict(said_first) == comes_down_to


def test_everything_the_teacher_says_is_turned_without_loss_and_comes_down_to_the_same():
    """Over many scenes: the same words but for those that join, and the same verdict as before."""
    rng, joins, turned_kinds = random.Random(0), Counter(["so", "which", "is", "it", "none"]), Counter()
    for _ in range(400):
        scene = random_scene(rng, "test")
        asked = [(kind, ask(scene, kind, rng)) for kind in (*KINDS, "look")]
        for kind, question in [*asked, ("detail", describe(scene, rng))]:
            if not question:
                continue
            answer = conclusion_first(question.answer)
            before, after = (Counter(re.findall(r"\w+", text.lower())) for text in (question.answer, answer))
            assert set((before - after) + (after - before)) <= set(joins)
            turned_kinds[kind] += answer != question.answer
            assert kind == "detail" or variants.first_verdict(answer) == variants.last_verdict(question.answer)
    assert {kind for kind, count in turned_kinds.items() if count} == {
        "count", "existence", "relation", "neighbour", "remaining",
    }  # fmt: skip


def test_only_answers_are_turned():
    turns = [{"from": "human", "value": "I say it, so no."}, {"from": "gpt", "value": "I see one, so one."}]
    record = {"id": "1", "kind": "conversation", "conversations": turns}
    told = [turn["value"] for turn in turned(record)["conversations"]]
    assert told == ["I say it, so no.", "One. I see one."]
    assert chosen([record], TURNED) == [turned(record)] and turns[1]["value"] == "I see one, so one."


# ---------------------------------------------------------------- scores


@pytest.fixture
def plan(miniature, tmp_path) -> ablations.Plan:
    return ablations.Plan(miniature, tmp_path, 1, 1, 1, per_kind=12)


def measured(plan: ablations.Plan, name: str, monkeypatch, say) -> dict:
    """What is found of a model that answers ``say(right answer)`` where it is shown the question's own image."""
    items = ablations.make_items(plan.world, plan.per_kind)
    right = {(item.question.text, item.image.id): item.question.answer for item in items}

    def stand_in(model, folder, questions, template):
        assert template == "vicuna_v1"
        return [say(right.get((text, image.id), "What?")) for text, image in questions]

    monkeypatch.setattr(ablations, "answers", stand_in)
    return ablations.measure(None, plan, VARIANTS[name])


def test_each_order_is_scored_by_its_own_rule(plan, monkeypatch):
    in_order, first = measured(plan, "all", monkeypatch, str), measured(plan, TURNED, monkeypatch, conclusion_first)
    for found in (in_order, first):
        measures = ("conversation", "detail", "reasoning", "together", "whole", "verdict")
        assert [found[name] for name in measures] == [1] * 6
    assert in_order["blind"]["whole"] < 0.3 and "blind" not in first
    unturned = measured(plan, TURNED, monkeypatch, str)
    assert unturned["exact"]["colour"] == 1 and unturned["exact"]["neighbour"] == 0
    assert unturned["verdicts"]["existence"] < 1


def test_a_verdict_counts_whatever_its_reasons(plan, monkeypatch):
    def other_reasons(answer):
        return conclusion_first(answer).replace(". Looking", ". Not looking").replace(". Without", ". Not without")

    found = measured(plan, TURNED, monkeypatch, other_reasons)
    assert found["verdicts"]["remaining"] == found["verdicts"]["count"] == 1
    assert found["exact"]["remaining"] == found["exact"]["count"] == 0


def test_groups_are_means_of_their_kinds():
    exact = dict(zip(KINDS, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0), strict=True)) | {"mean": 0.5}
    found = ablations.figures(exact, {"mean": 0.25})
    assert (found["conversation"], found["reasoning"]) == (pytest.approx(0.4), pytest.approx(0.9))
    assert (found["whole"], found["verdict"]) == (0.5, 0.25)


# ---------------------------------------------------------------- the comparison


def run_of(together: float, verdict: float = 0.5) -> dict:
    found = dict.fromkeys(("conversation", "detail", "reasoning", "things", "whole"), together)
    blind = dict.fromkeys(findings.CLOSED, 0.25)
    return found | {"together": together, "verdict": verdict, "blind": blind}


RUNS = {
    "all": [run_of(0.80, 0.90), run_of(0.82, 0.92), run_of(0.87, 0.94)],
    "conversation": [run_of(0.70), run_of(0.71), run_of(0.75)],
    "none": [run_of(0.90), run_of(0.91), run_of(0.95)],
    "last-layer": [run_of(0.5, 0.80), run_of(0.5, 0.85), run_of(0.5, 0.90)],
    "linear": [run_of(0.5, 0.80), run_of(0.5, 0.81), run_of(0.5, 0.82)],
}
GUESSING = dict.fromkeys(findings.CLOSED, 0.2)


def test_means_ranges_and_outcomes_by_hand():
    rows = {(name, measure): row for name, measure, *row in findings.compared(RUNS)}
    gap, paper, word = rows["conversation", "together"]  # 72 - 83; 73.8 - 85.1
    assert (round(gap, 6), round(paper, 6), word) == (-11.0, -11.3, "agrees")
    gap, paper, word = rows["none", "together"]  # 92 - 83; 21.5 - 85.1
    assert (round(gap, 6), round(paper, 6), word) == (9.0, -63.6, "disagrees")
    gap, paper, word = rows["last-layer", "verdict"]  # 85 - 92: the best of one is the worst of the other
    assert (round(gap, 6), round(paper, 6), word) == (-7.0, -0.96, "within the spread")
    gap, paper, word = rows["linear", "verdict"]
    assert (round(gap, 6), paper, word) == (-11.0, None, "agrees")
    assert {measure for name, measure in rows if name == "none"} == {"conversation", "detail", "reasoning", "together"}


@pytest.mark.parametrize("found, paper, word", [
    ([3.0, 5.0], -1, "within the spread"), ([2.1, 9.0], 1, "agrees"), ([2.1, 9.0], -1, "disagrees"),
    ([0.0, 0.9], -1, "agrees"), ([0.0, 9.0], 1, "within the spread"), ([2.0, 9.0], 1, "within the spread"),
])  # fmt: skip
def test_outcomes(found, paper, word):
    base = [1.0, 2.0] if found != [3.0, 5.0] else [4.0, 4.0]
    assert findings.outcome(base, found, paper) == word


def test_the_report_prints_what_came_out_beside_the_paper():
    lines = findings.report(RUNS, GUESSING, 900, 300).splitlines()
    ours = "72.0 (70.0 to 75.0)"
    assert f"| conversation only | {ours} | 76.5 | {ours} | 59.8 | {ours} | 84.9 | {ours} | 73.8 |" in lines
    assert (
        "| the tower's last layer | 85.0 (80.0 to 90.0) | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) | 89.96 |" in lines
    )
    assert "| guessing | 20.0 | 20.0 |  |  |" in lines and "| guessing | 20.0 |  |  |  | 20.0 |  |  |  |" in lines
    assert "| the miniature's recipe, blind | 25.0 | 25.0 |  |  |" in lines
    assert "| conversation only | together | -11.0 | -11.3 | agrees |" in lines
    assert "| linear projector | verdict | -11.0 | lower | agrees |" in lines
    assert "| the tower's last layer | verdict | -7.0 | -1.0 | within the spread |" in lines
    explained = [line for line in lines if line.startswith("* ")]
    assert [line.split(":")[0] for line in explained] == ["* none (stage 1 only)", "* the tower's last layer"]
    assert "3 seeds" in lines[0] and "fewer" not in lines[0]


def test_numbers_sum_up_each_measure():
    found = findings.numbers(RUNS, GUESSING)
    assert found["summary"]["all"]["verdict"] == {
        "mean": pytest.approx(0.92), "lowest": pytest.approx(0.90), "highest": pytest.approx(0.94),
    }  # fmt: skip
    assert found["runs"] == RUNS and len(found["against the paper"]) == 4 + 4 + 1 + 1


def test_the_picture_has_a_dot_for_each_seed_and_the_paper_s_diamond():
    image = findings.plot(RUNS)
    one = findings.plot({"all": RUNS["all"], "linear": RUNS["linear"]})
    assert image.height > one.height
    place = lambda score: round(findings.LEFT + findings.WIDTH * (score - 80) / 20)  # noqa: E731
    y = findings.TOP + findings.ROW // 2
    blue = [tuple(bytes.fromhex(colour[1:])) for colour in (findings.OURS, findings.PAPER)]
    assert [one.getpixel((place(score), y)) for score in (90, 92, 94)] == 3 * blue[:1]
    assert one.getpixel((place(90.92), y - 8)) == blue[1] and one.getpixel((place(98), y)) == (255, 255, 255)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("more, told", [
    (["--only", "conversation,everything"], "--only everything: no such variant; choose from all, last-layer"),
    (["--seeds", "0"], "--seeds is 0: it must be above 0"),
    (["--steps", "-1"], "--steps is -1: it must be above 0"),
    (["--at-once", "0"], "--at-once is 0: it must be above 0"),
])  # fmt: skip
def test_numbers_and_names_without_sense_are_one_line(more, told, miniature, tmp_path, capsys):
    assert main(["ablations", *words(miniature, tmp_path / "out"), *more]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {told}") and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_miniature_is_one_line(miniature, tmp_path, capsys):
    for missing in ("recipe.json", "clip", "world/done"):
        folder = tmp_path / missing.replace("/", "-")
        for part in set(ablations.PARTS) - {missing}:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).symlink_to(miniature / part)
        assert main(["ablations", *words(folder, tmp_path / "out")]) == 2
        told = (
            f"error: {folder}: is no finished miniature, it has no {missing}; make one with  python train.py miniature"
        )
        assert capsys.readouterr().err.startswith(told)
    (tmp_path / "recipe.json/recipe.json").write_text("{}")
    assert main(["ablations", *words(tmp_path / "recipe.json", tmp_path / "out")]) == 2
    assert "the field 'language_steps' is None" in capsys.readouterr().err


def test_a_world_with_records_of_others_is_one_line(miniature, tmp_path, capsys):
    shutil.copytree(miniature, tmp_path / "other", ignore=shutil.ignore_patterns("images"))
    file = tmp_path / "other/world/instruct.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps([kept[0], {name: kept[1][name] for name in ("id", "image", "conversations")}]))
    assert main(["ablations", *words(tmp_path / "other", tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file}: record number 1 has no kind") and told.count("\n") == 1


def test_runs_of_another_setting_are_not_taken_for_these(miniature, finished, tmp_path, capsys):
    before = sorted(finished.rglob("*"))
    assert main(["ablations", *words(miniature, finished), "--steps", "4"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {finished} holds runs with another number of steps, or of another"
    )
    assert sorted(finished.rglob("*")) == before
    (tmp_path / "poem.txt").write_text("mine")
    assert main(["ablations", *words(miniature, tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: holds other files; choose another --out\n"


def test_without_train_py_it_says_so(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations.nanollava, "__file__", str(tmp_path / "site/nanollava/__init__.py"))
    assert main(["ablations", *words(miniature, tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'site/train.py'}: no such file")


# ---------------------------------------------------------------- train.py's options for them


def captions(folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A small red star."}]
    file = folder / "records.json"
    file.write_text(json.dumps([{"id": name, "image": f"{name}.png", "conversations": turns} for name in "abcd"]))
    return file


def test_stage_2_of_a_new_model_reads_the_layer_asked_for_from_whitened_features(trainer, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(train, "whiten", lambda projector, features: rows.append(features))
    given = ("--steps", 1, "--batch-size", 2, "--whiten")
    for layer in (-1, -2):
        out = tmp_path / f"layer{layer}"
        assert trainer.stage(2, captions(tmp_path), out, *given, "--select-layer", layer) == 0
        assert load(out).config.select_layer == layer
    assert trainer.stage(2, captions(tmp_path), tmp_path / "given", *given) == 0
    assert (rows[1] == rows[2]).all() and not (rows[0] == rows[1]).all()


def test_layers_that_are_not_there_and_options_of_a_new_model_are_refused(trainer, tmp_path, capsys):
    data = captions(tmp_path)
    assert trainer.stage(2, data, tmp_path / "out", "--select-layer", 3) == 2
    assert capsys.readouterr().err == "error: --select-layer 3: the tower has 2 blocks; give -3 to 2\n"
    assert trainer.stage(1, data, tmp_path / "stage1", "--steps", 1) == 0
    capsys.readouterr()
    for option in (["--whiten"], ["--select-layer", "-1"], ["--projector", "linear"]):
        assert trainer.stage(2, data, tmp_path / "out", "--model", tmp_path / "stage1", *option) == 2
        assert "--select-layer belong to a new model: --model has its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_choice_of_records_belongs_to_a_variant_and_the_base_comes_first():
    assert {variant.records for variant in VARIANTS.values()} == {None, TURNED, *KEPT}
    assert next(iter(VARIANTS)) == "all" and set(VARIANTS) == {*findings.BENCH, *findings.SCIENCE}
