"""What the stages train and what they leave alone, bit for bit; the table that says so; what carries loss."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nanollava.checkpoint import load, load_language, load_vision, save
from nanollava.conversation import IGNORE
from nanollava.llava import LlavaConfig
from nanollava.tokenizer import load_tokenizer
from nanollava.train.data import Dataset, count_targets
from nanollava.train.loop import Options, Run
from nanollava.train.records import read_records
from nanollava.train.stages import STAGES, freeze, parameter_table

CONVERSATION = {
    "id": "1",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A small red star."},
        {"from": "human", "value": "What color is the ball?"},
        {"from": "gpt", "value": "The ball is blue."},
    ],
}
CAPTION = {
    "id": "2",
    "image": "b.png",
    "conversations": [
        {"from": "human", "value": "Tell me.\n<image>"},
        {"from": "gpt", "value": "A green circle and\na square."},
    ],
}
STATES = {"vision": 39, "projector": 2, "language": 21}  # tensors of each part, so that no comparison is empty


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "records.json"
    file.write_text(json.dumps([CAPTION, {**CAPTION, "id": "3", "image": "c.png"}]))
    return file


@pytest.fixture(scope="module")
def aligned(trainer, data) -> Path:
    """The result of a short stage 1."""
    out = data.parent / "stage1"
    assert trainer.stage(1, data, out, "--steps", 4, "--batch-size", 2) == 0
    return out


def same_tensors(a: nn.Module, b: nn.Module) -> list[bool]:
    """For each tensor of two modules of one kind: is it the same, bit for bit?"""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    return [torch.equal(mine[name], theirs[name]) for name in mine]


def test_stage_1_changes_the_projector_and_not_a_bit_of_the_rest(trainer, data, aligned, tmp_path):
    """In its first step the rate is 0, so a run of one step leaves the projector that the same seed starts with."""
    assert trainer.stage(1, data, tmp_path / "start", "--steps", 1) == 0
    start, after = load(tmp_path / "start"), load(aligned)
    assert same_tensors(after.vision, load_vision(trainer.clip)) == [True] * STATES["vision"]
    assert same_tensors(after.language, load_language(trainer.vicuna)) == [True] * STATES["language"]
    assert same_tensors(after.projector, start.projector) == [False] * STATES["projector"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stage_2_changes_projector_and_language_model_and_not_a_bit_of_the_tower(
    optimizer, trainer, data, aligned, tmp_path
):
    words = ("--model", aligned, "--steps", 3, "--batch-size", 2, "--lr", 1e-3, "--optimizer", optimizer)
    assert trainer.stage(2, data, tmp_path / "out", *words) == 0
    before, after = load(aligned), load(tmp_path / "out")
    assert same_tensors(after.vision, before.vision) == [True] * STATES["vision"]
    assert same_tensors(after.projector, before.projector) == [False] * STATES["projector"]
    assert same_tensors(after.language, before.language) == [False] * STATES["language"]


def test_a_folder_says_which_stage_and_template_made_it(trainer, data, aligned, tmp_path):
    """Also where the model to go on from spoke another template: it is trained on the stage's."""
    other = load(aligned)
    other.config.template = "llava_v0"
    save(other, tmp_path / "other")
    assert trainer.stage(2, data, tmp_path / "out", "--model", tmp_path / "other", "--steps", 1) == 0
    found = [(c.stage, c.template) for c in (load(aligned).config, load(tmp_path / "out").config)]
    assert found == [("stage1", "plain"), ("stage2", "vicuna_v1")]


# ---------------------------------------------------------------- the table


def by_hand(width: int = 16, vocabulary: int = 400) -> dict[str, int]:
    """The sizes of the tiny parts: image 16, patch 8, 2 layers; inside them 16; the language model is 32 wide."""
    attention, mlp, norms = 4 * (width * width + width), 2 * (16 * width + width), 4 * width
    embeddings = width + 3 * 8 * 8 * width + (1 + 4) * width
    vision = embeddings + 2 * width + 2 * width + 2 * (attention + mlp + norms)
    D = 32
    block = 2 * D * D + 2 * D * 16 + 3 * 16 * D + 2 * D  # one key/value head of 16 for two of queries
    return {
        "vision": vision,
        "projector": width * D + D,
        "language": 2 * vocabulary * D + 2 * block + D,
    }


@pytest.mark.parametrize(("stage", "trained"), [(1, {"projector"}), (2, {"projector", "language"})])
def test_the_table_counts_what_there_is_and_what_is_trained(stage, trained, trainer, data, tmp_path, capsys):
    assert trainer.stage(stage, data, tmp_path / "out", "--steps", 1) == 0
    sizes = by_hand()
    rows = {part: [size, size * (part in trained)] for part, size in sizes.items()}
    rows["all"] = [sum(sizes.values()), sum(sizes[part] for part in trained)]
    lines = capsys.readouterr().out.replace(",", "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["part", "parameters", "trained"])
    found = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in lines[start + 1 : start + 5]}
    assert found == rows


def test_the_table_counts_a_tied_head_once(scripted_model):
    model = scripted_model.says("Yes.")
    freeze(model, STAGES["stage2"])
    before = parameter_table(model).splitlines()[3].replace(",", "").split()
    model.language.lm_head.weight = model.language.embed_tokens.weight
    after = parameter_table(model).splitlines()[3].replace(",", "").split()
    assert [int(a) - int(b) for a, b in zip(before[1:], after[1:], strict=True)] == [400 * 128] * 2


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(("stage", "trained"), [("stage1", {"projector"}), ("stage2", {"projector", "language"})])
def test_frozen_parts_get_no_gradients_and_all_of_the_others_do(stage, trained, trainer, data, aligned, tmp_path):
    model = load(aligned)
    examples, _ = read_records(data, trainer.images, model.tokenizer, model.config, STAGES[stage].template)
    run = Run(
        model,
        STAGES[stage],
        Dataset([examples], trainer.images, model.config),
        None,
        tmp_path,
        Options(1e-3, None, 1, 1),
    )
    batches = run.data.batches([0])
    assert run.backward(batches, count_targets(batches)) > 0
    for part in STATES:
        gradients = [p.grad for p in getattr(model, part).parameters()]
        if part in trained:
            assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        else:
            assert gradients == [None] * STATES[part]


# ---------------------------------------------------------------- what carries loss


def read_one(trainer, record: dict, template: str, tmp_path):
    """(learnt ids, other ids, tokenizer) of a record that was read from its file."""
    file = tmp_path / "one.json"
    file.write_text(json.dumps([record]))
    tokenizer = load_tokenizer(trainer.vicuna)
    (example,), _ = read_records(file, trainer.images, tokenizer, load_config(trainer), template)
    learnt = example.labels != IGNORE
    assert (example.labels[learnt] == example.token_ids[learnt]).all()
    return example.token_ids[learnt].tolist(), example.token_ids[~learnt].tolist(), tokenizer


def load_config(trainer):
    return LlavaConfig(load_vision(trainer.clip).config, load_language(trainer.vicuna).config)


def test_in_stage_2_answers_and_their_stop_tokens_carry_loss_and_user_words_never_do(trainer, tmp_path):
    learnt, other, tokenizer = read_one(trainer, CONVERSATION, "vicuna_v1", tmp_path)
    assert learnt.count(tokenizer.eos_id) == 2 and learnt[-1] == tokenizer.eos_id and tokenizer.eos_id not in other
    cut = learnt.index(tokenizer.eos_id)
    said = [tokenizer.decode(ids).strip() for ids in (learnt[:cut], learnt[cut:])]
    assert said == ["A small red star.", "The ball is blue."]
    rest = tokenizer.decode(other)
    for words in ("What is this?", "What color is the ball?", "USER:", "ASSISTANT:", "A chat between"):
        assert words in rest
    assert "star" not in rest and "blue" not in rest


def test_in_stage_1_the_caption_and_the_end_of_its_line_carry_loss_and_the_instruction_is_not_there(trainer, tmp_path):
    learnt, other, tokenizer = read_one(trainer, CAPTION, "plain", tmp_path)
    assert tokenizer.decode(learnt) == "A green circle and\na square.\n"
    assert other == [tokenizer.bos_id, -200]
