"""Records become batches: however they are packed, loss and gradients are those of the records one by one.

The oracle takes each record alone through `encode` and the plain forward pass, without documents, branches or rows.
"""

import dataclasses
import functools
import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nanollava import llama
from nanollava.attention import Mask, attention
from nanollava.conversation import IGNORE, encode, images_from_record, messages_from_record
from nanollava.error import Error
from nanollava.images import preprocess
from nanollava.llama import LlamaConfig
from nanollava.llava import NO_PATCH, Batch, Llava, LlavaConfig, Spliced
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE
from nanollava.tokenizer import Tokenizer
from nanollava.train.data import Dataset, Document, best_fit, collate, documents, pack
from nanollava.train.records import Example, group, group_by_image, image_path, read_list, read_records
from nanollava.vit import VisionConfig

N = 4  # patches of an image
VISION = VisionConfig(16, 8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
LANGUAGE = LlamaConfig(400, 16, 16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def config(max_length: int = 512, aspect: str = "crop") -> LlavaConfig:
    return LlavaConfig(VISION, LANGUAGE, "mlp2x_gelu", image_aspect_ratio=aspect, max_length=max_length)


def record(name: str, image: str | list[str] | None, *turns: str) -> dict:
    """An official record: human and gpt in turn."""
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


MIXED = [  # about a: questions that begin alike, and one of two turns; several images; one image twice; text only
    record("a1", "a.png", "<image>\nWhat color is the ball?", "The ball is blue."),
    record("t1", None, "What is a square?", "It has four sides."),
    record("a2", "a.png", "<image>\nWhat color is the star?", "Red."),
    record("b1", "b.png", "What is this?\n<image>", "A star.", "And its size?", "It is small."),
    record("a3", "a.png", "<image>\nIs there a circle?", "There are three: a big green one and two small ones."),
    record("ab", ["a.png", "b.png"], "Here <image> and there <image>: the same?", "No."),
    record("c2", "c.png", "<image>\nOne?", "Yes.", "<image>\nOnce more?", "Yes, again."),
    record("t2", None, "What is a square?", "Four equal sides."),
    record("a4", "a.png", "<image>\nWhat color is the star?", "Red."),  # the same once more
]
CAPTIONS = [
    record("a1", "a.png", "<image>\nDescribe it.", "A blue ball."),
    record("a2", "a.png", "Tell me.\n<image>", "A blue ball and a star."),
    record("b1", "b.png", "<image>", "Three stars."),
    record("a3", "a.png", "<image>", "The ball."),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_file):
    return Tokenizer(tiny_tokenizer_file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures of noise."""
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    return folder


@pytest.fixture
def read(tmp_path, folder, tokenizer):
    """A function: records, settings and template -> examples and report, through a JSON file."""

    def read(records: list, settings: LlavaConfig | None = None, template: str = "vicuna_v1", images=folder):
        file = tmp_path / "records.json"
        file.write_text(json.dumps(records), encoding="utf-8")
        return read_records(file, images, tokenizer, settings or config(), template)

    return read


@functools.cache
def model() -> Llava:
    torch.manual_seed(0)
    return Llava(config()).double()


def loss_and_gradients(losses: list[torch.Tensor]) -> list[torch.Tensor]:
    total = sum(losses)
    gradients = torch.autograd.grad(total, list(model().parameters()), allow_unused=True)
    return [total.detach(), *(g for g in gradients if g is not None)]


def one_by_one(records, tokenizer, folder, template="vicuna_v1", max_length=512):
    """Loss, gradients and target tokens of records that never met."""
    losses, targets = [], []
    for item in records:
        names = images_from_record(item)
        token_ids, labels = encode(messages_from_record(item), tokenizer, template, images=len(names))
        names = names * token_ids.count(IMAGE) if len(names) == 1 else names
        pixels = [preprocess(Image.open(folder / name), 16, "crop") for name in names]
        wide = [x for t, label in zip(token_ids, labels, strict=True) for x in [label] * (N if t == IMAGE else 1)]
        wide = torch.tensor(wide[:max_length])
        logits = model()(torch.tensor([token_ids]), torch.stack(pixels) if pixels else None)[0, :max_length]
        losses.append(F.cross_entropy(logits[:-1], wide[1:], ignore_index=IGNORE, reduction="sum"))
        targets += wide[wide != IGNORE].tolist()
    return loss_and_gradients(losses), sorted(targets)


def packed(groups, folder, max_length=512, rows_at_once=0):
    """The same through Dataset, and its batches."""
    data = Dataset(groups, folder, config(max_length))
    batches = data.batches(range(len(groups)), rows_at_once)
    targets = torch.cat([b.labels[b.labels != IGNORE] for b in batches])
    return loss_and_gradients([model().loss(b) for b in batches]), sorted(targets.tolist()), batches


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Norms, angles and the last softmax are float32 in any model, by ``x.float()``: here that gives float64 too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Loss and gradients, to ten digits of the largest number in each; but for the keys' biases, which move no softmax:
    their gradients are zero, up to rounding, a few 1e-17 of numbers near one."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item() + 1e-16)


def singles(examples: list[Example]) -> list[list[Example]]:
    return [[example] for example in examples]


# ---------------------------------------------------------------- however packed, the same loss and gradients


@pytest.mark.parametrize("rows_at_once", [0, 1, 2], ids=lambda n: f"{n} rows at once")
@pytest.mark.parametrize("max_length", [512, 200], ids=["long rows", "short rows"])
@pytest.mark.parametrize("grouping", [singles, group_by_image], ids=["apart", "shared"])
def test_packed_records_have_the_loss_and_gradients_of_records_alone(
    grouping, max_length, rows_at_once, read, tokenizer, folder
):
    expected, targets = one_by_one(MIXED, tokenizer, folder)
    examples, report = read(MIXED)
    assert (len(examples), report.findings) == (9, [])
    found, found_targets, batches = packed(grouping(examples), folder, max_length, rows_at_once)
    assert found_targets == targets
    assert_same(found, expected)
    rows = [len(batch.token_ids) for batch in batches]
    assert len(batches) == 1 if rows_at_once == 0 else max(rows) <= rows_at_once
    assert sum(rows) > 1


@pytest.mark.parametrize("grouping", [singles, group_by_image], ids=["apart", "shared"])
def test_everything_in_one_row_is_the_same_too(grouping, read, tokenizer, folder):
    expected, targets = one_by_one(MIXED, tokenizer, folder)
    found, found_targets, batches = packed(grouping(read(MIXED)[0]), folder, max_length=4096)
    assert [len(batch.token_ids) for batch in batches] == [1] and found_targets == targets
    assert_same(found, expected)


def test_captions_share_their_image_and_every_caption_is_learnt_from_its_first_token(read, tokenizer, folder):
    """The first word is predicted from the last patch, so that each branch has that patch for itself."""
    expected, targets = one_by_one(CAPTIONS, tokenizer, folder, "plain")
    examples, _ = read(CAPTIONS, template="plain")
    found, found_targets, (batch,) = packed(group_by_image(examples), folder)
    assert found_targets == targets
    assert_same(found, expected)
    assert len(batch.pixels) == 2 and len(examples) == 4
    lasts = [3, 3, 3, N + 3]  # the last patch of image 0 three times, of image 1 once
    assert sorted(f for f in batch.patches.flatten().tolist() if f in lasts) == lasts


def test_a_group_too_long_for_a_row_is_split_and_still_the_same(read, tokenizer, folder):
    questions = [record(str(i), "a.png", f"<image>\nWhat is {i}?", f"It is {i} of them, a ball.") for i in range(7)]
    expected, targets = one_by_one(questions, tokenizer, folder)
    examples, _ = read(questions)
    limit = 180
    docs = list(documents(examples, N, limit))
    assert 1 < len(docs) < 7 and all(len(doc.positions) <= limit for doc in docs)
    assert max(max(doc.branches) for doc in docs) > 1
    found, found_targets, _ = packed([examples], folder, limit)
    assert found_targets == targets
    assert_same(found, expected)


def test_records_longer_than_a_row_are_cut_counted_and_otherwise_learnt(read, tokenizer, folder):
    """Both ends are lost, with an image and without; what is left is what the record alone would give, cut."""
    limit = 120
    records = [
        record("a1", "a.png", "<image>\nWhat color?", "Blue. " * 30),
        record("a2", "a.png", "<image>\nWhat shape?", "A ball. " * 30),
        record("t1", None, "Say it.", "The square. " * 30),
        record("t2", None, "Say it.", "Yes."),
    ]
    expected, targets = one_by_one(records, tokenizer, folder, max_length=limit)
    examples, report = read(records, config(limit))
    assert (len(report.named("cut")), report.records, len(examples), report.problems) == (3, 4, 4, [])
    for grouping in (singles, group_by_image):
        found, found_targets, _ = packed(grouping(examples), folder, limit)
        assert found_targets == targets
        assert_same(found, expected)


def test_a_record_that_just_fits_is_not_counted_as_cut(read):
    length = len(read(MIXED[:1])[0][0].token_ids) + N - 1
    cut = [read(MIXED[:1], config(limit))[1].named("cut") for limit in (length - 1, length, length + 1)]
    assert cut == [["a1"], [], []]


QUESTIONS = ("What color is the ball?", "What color is the star?", "Is there a circle?", "And?")
ANSWERS = ("Red.", "The ball is blue.", "There are three shapes: a circle, a square and a triangle.", "No. " * 9)


def random_record(draw: random.Random, name: str) -> dict:
    """Text only, one image in the first turn, one in each turn, or several."""
    turns = [text for _ in range(draw.randint(1, 3)) for text in (draw.choice(QUESTIONS), draw.choice(ANSWERS))]
    kind, images = draw.choice(["text", "one", "again", "several"]), draw.choices(["a.png", "b.png", "c.png"], k=3)
    if kind == "text":
        return record(name, None, *turns)
    if kind == "several":
        return record(name, images, "<image> and <image>\n<image> " + turns[0], *turns[1:])
    marked = [
        f"<image>\n{text}" if i == 0 or (kind == "again" and i % 2 == 0) else text for i, text in enumerate(turns)
    ]
    return record(name, images[0], *marked)


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_has_the_loss_and_gradients_of_its_records_alone(seed, read, tokenizer, folder):
    draw = random.Random(seed)
    records = [random_record(draw, str(i)) for i in range(draw.randint(5, 12))]
    expected, targets = one_by_one(records, tokenizer, folder)
    examples, report = read(records)
    assert len(examples) == len(records) and not report.findings
    longest = max(len(e.token_ids) + len(e.images) * (N - 1) for e in examples)
    grouping, limit = draw.choice([singles, group_by_image]), longest + draw.choice([0, 100, 2000])
    found, found_targets, _ = packed(grouping(examples), folder, limit, rows_at_once=draw.choice([0, 1, 2]))
    assert found_targets == targets
    assert_same(found, expected)


@pytest.mark.parametrize("grouping", [singles, group_by_image], ids=["apart", "shared"])
def test_no_position_sees_another_record_by_a_single_bit(grouping, read, folder, monkeypatch):
    """Each record in turn gets other tokens and another picture, in the plain execution of the equation."""
    monkeypatch.setattr(llama, "attention", functools.partial(attention, how="plain"))
    groups = grouping(read(MIXED)[0])
    (batch,) = Dataset(groups, folder, config(300)).batches(range(len(groups)))
    rows = torch.arange(len(batch.documents)).unsqueeze(1).expand_as(batch.documents)
    owners = torch.stack([rows, batch.documents, batch.branches], dim=-1)  # (B, T, 3): whose each position is
    everyone = {tuple(o) for o in owners[batch.documents >= 0].tolist()}
    beginnings = sum(branch == 0 for *_, branch in everyone)
    assert len(everyone) - beginnings == 9 and beginnings == (grouping != singles)
    assert 1 < len({row for row, *_ in everyone}) < 9

    def logits(b: Batch) -> torch.Tensor:
        x = model().embed(b.token_ids, b.patches, b.pixels)
        hidden = model().language.hidden(x, b.positions, Mask(documents=b.documents, branches=b.branches))
        return model().language.lm_head(hidden)

    with torch.no_grad():
        before = logits(batch)
        for row, document, branch in everyone:
            own = (owners == torch.tensor([row, document, branch])).all(-1)
            sees = own if branch else (owners[..., :2] == torch.tensor([row, document])).all(-1)  # a shared beginning
            images = batch.patches[own & (batch.patches != NO_PATCH)].unique() // N
            token_ids, pixels = batch.token_ids.clone(), batch.pixels.clone()
            token_ids[own & (token_ids != IMAGE)] += 1
            shown_elsewhere = batch.patches[~sees & (batch.patches != NO_PATCH)] // N
            mine = [i for i in images.unique().tolist() if i not in shown_elsewhere]
            pixels[mine] += 1
            after = logits(dataclasses.replace(batch, token_ids=token_ids, pixels=pixels))
            assert torch.equal(after[~sees], before[~sees]) and not torch.equal(after[own], before[own])


def test_sharing_pays_for_the_image_once(read, folder):
    examples, _ = read(MIXED)
    apart, shared = (packed(grouping(examples), folder)[2] for grouping in (singles, group_by_image))
    # apart: a four times, b, a and b, c twice; shared: a once
    assert [sum(len(b.pixels) for b in batches) for batches in (apart, shared)] == [9, 6]
    used = [sum(int((b.documents >= 0).sum()) for b in batches) for batches in (apart, shared)]
    beginning = examples[0].token_ids.tolist().index(IMAGE) + N
    assert used[0] - used[1] >= 3 * beginning


# ---------------------------------------------------------------- documents and rows, worked by hand


def example(token_ids: list[int], labels: list[int], *images: str) -> Example:
    return Example(np.array(token_ids, np.int32), np.array(labels, np.int32), images)


def test_a_shared_document_worked_by_hand():
    """`1 <image> 5` is common; 6 and 8 are predicted from the 5 in front of them, so each branch has its own 5."""
    i, no = IGNORE, NO_PATCH
    one = example([1, IMAGE, 5, 6, 7], [i, i, i, 6, 7], "a")
    two = example([1, IMAGE, 5, 8], [i, i, i, 8], "a")
    (found,) = documents([one, two], num_patches=2, max_length=100)
    assert found == Document(
        columns=Spliced(
            token_ids=[1, IMAGE, IMAGE, 5, 6, 7, 5, 8],
            labels=[i, i, i, i, 6, 7, i, 8],
            patches=[no, 0, 1, no, no, no, no, no],
        ),
        positions=[0, 1, 2, 3, 4, 5, 3, 4],
        branches=[0, 0, 0, 1, 1, 1, 2, 2],
        images=("a",),
    )


@pytest.mark.parametrize(
    ("max_length", "branches"), [(9, [3]), (8, [2, 1]), (7, [2, 1]), (6, [1, 1, 1]), (5, [1, 1, 1])]
)
def test_branches_share_a_document_up_to_the_last_position(max_length, branches):
    """`1 2 3` is common and each branch has two positions of its own: 3 + 2 + 2 + 2."""
    examples = [example([1, 2, 3, 4, 5 + n], [IGNORE] * 4 + [5 + n]) for n in range(3)]
    assert [max(doc.branches) for doc in documents(examples, num_patches=2, max_length=max_length)] == branches


def test_one_example_alone_has_one_branch():
    (found,) = documents([example([1, 5, 6], [IGNORE, IGNORE, 6])], num_patches=2, max_length=100)
    assert found == Document(
        Spliced([1, 5, 6], [IGNORE, IGNORE, 6], [NO_PATCH] * 3), positions=[0, 1, 2], branches=[1, 1, 1], images=()
    )


def test_examples_that_begin_differently_share_nothing():
    one, two = example([1, 5, 6], [IGNORE, IGNORE, 6]), example([2, 5, 6], [IGNORE, IGNORE, 6])
    (found,) = documents([one, two], num_patches=2, max_length=100)
    assert found.branches == [1, 1, 1, 2, 2, 2] and found.positions == [0, 1, 2, 0, 1, 2]


def test_a_target_at_the_very_beginning_leaves_nothing_to_share():
    one, two = example([1, 5, 6], [IGNORE, 5, 6]), example([1, 5, 7], [IGNORE, 5, 7])
    (found,) = documents([one, two], num_patches=2, max_length=100)
    assert found.branches == [1, 1, 1, 2, 2, 2]


def of_length(length: int) -> Document:
    return Document(Spliced([7] * length, [7] * length, [NO_PATCH] * length), list(range(length)), [1] * length, ())


def packed_lengths(lengths: list[int], max_length: int) -> list[list[int]]:
    return [[len(doc.positions) for doc in row] for row in pack(map(of_length, lengths), max_length)]


def test_best_fit_worked_by_hand():
    """6 opens a row, 5 another; 3 goes where 6 left 4 (first fit would too), 2 where 3 are left, not where 5 are."""
    assert best_fit([6, 5, 3, 2, 4], limit=10) == [[0, 2], [1, 3], [4]]
    assert best_fit([5, 6, 4], limit=10) == [[0], [1, 2]]  # first fit: [[0, 2], [1]]
    assert best_fit([10, 10], limit=10) == [[0], [1]] and best_fit([], limit=10) == []


def test_packing_worked_by_hand():
    """Two rows of 20 would do with 20 and 3; as few rows are filled evenly, so that little is padding."""
    assert packed_lengths([1, 5, 3, 7, 4], 10) == [[7, 3], [5, 4, 1]]
    assert packed_lengths([9, 8, 3, 3], 20) == [[9, 3], [8, 3]]
    assert packed_lengths([10], 10) == [[10]] and packed_lengths([], 10) == []


def first_fit_rows(lengths: list[int], limit: int) -> int:
    """How many rows the plainest rule needs: the longest first, each into the first row with room."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        i = next((i for i, used in enumerate(rows) if used + length <= limit), len(rows))
        rows[i : i + 1] = [rows[i] + length if i < len(rows) else length]
    return len(rows)


@pytest.mark.parametrize(("low", "high"), [(1, 100), (30, 60), (1, 12)])
def test_packing_loses_nothing_exceeds_nothing_and_pads_no_more_than_the_plainest_rule(low, high):
    needed, plainest, longest = 0, 0, 0
    for seed in range(30):
        lengths = torch.randint(low, high + 1, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = packed_lengths(lengths, 100)
        assert sorted(length for row in rows for length in row) == sorted(lengths)
        assert max(map(sum, rows)) <= 100
        needed, plainest, longest = (
            needed + len(rows),
            plainest + first_fit_rows(lengths, 100),
            longest + max(map(sum, rows)),
        )
    assert needed <= plainest and longest < 30 * 100


@pytest.mark.parametrize("limit", [10, 11, 12])
def test_the_rows_are_the_shortest_that_are_as_few(limit):
    """Against every assignment of six lengths to the rows: here best fit finds the optimum."""
    lengths = [5, 4, 3, 3, 2, 1]
    rows = packed_lengths(lengths, limit)
    assert len(rows) == 2
    choices = itertools.product(range(2), repeat=6)
    loads = (
        max(sum(n for n, c in zip(lengths, choice, strict=True) if c == r) for r in range(2)) for choice in choices
    )
    assert max(map(sum, rows)) == min(loads)


def test_collating_worked_by_hand():
    """Two rows: two documents with an image each; one document without. Images are numbered through the batch."""
    i, no = IGNORE, NO_PATCH
    first = Document(Spliced([1, IMAGE, IMAGE, 5], [i, i, i, 5], [no, 0, 1, no]), [0, 1, 2, 3], [1] * 4, ("a",))
    other = Document(Spliced([1, IMAGE, IMAGE, 6], [i, i, i, 6], [no, 0, 1, no]), [0, 1, 2, 3], [0, 0, 1, 1], ("b",))
    pixels = {"a": torch.zeros(3, 2, 2), "b": torch.ones(3, 2, 2)}
    batch = collate([[first, other], [of_length(3)]], num_patches=2, load=pixels.__getitem__)
    tables = {name: table for name, table in vars(batch).items() if name != "pixels"}
    assert {tuple(table.shape) for table in tables.values()} == {(2, 64)}
    assert {name: table[0, :9].tolist() for name, table in tables.items()} == {
        "token_ids": [1, IMAGE, IMAGE, 5, 1, IMAGE, IMAGE, 6, 0],
        "labels": [i, i, i, 5, i, i, i, 6, i],
        "patches": [no, 0, 1, no, no, 2, 3, no, no],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 0],
        "documents": [0, 0, 0, 0, 1, 1, 1, 1, -1],
        "branches": [1, 1, 1, 1, 0, 0, 1, 1, 0],
    }
    assert batch.documents[1].tolist() == [0] * 3 + [-1] * 61
    assert batch.pixels.mean((1, 2, 3)).tolist() == [0, 1]


def test_grouping_keeps_order_and_text_apart():
    a, b, ab, t, u = (example([n], [n], *images) for n, images in enumerate([("a",), ("b",), ("a", "b"), (), ()]))
    assert group_by_image([a, b, ab, t, a, u]) == [[a, a], [b], [ab], [t], [u]]
    assert group([a, b, t], "xyx") == [[a, t], [b]]


def test_text_alone_needs_no_pixels_and_no_folder(read, tokenizer):
    examples, report = read([MIXED[1], MIXED[7]], images=None)
    (batch,) = Dataset(singles(examples), None, config()).batches([1])
    assert report.problems == [] and batch.pixels is None


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_pictures_become_pixels_the_way_the_config_says(aspect, read, folder):
    examples, _ = read(MIXED[:1])
    (batch,) = Dataset(singles(examples), folder, config(aspect=aspect)).batches([0])
    assert torch.equal(batch.pixels[0], preprocess(Image.open(folder / "a.png"), 16, aspect))


def test_the_chosen_groups_are_the_ones_in_the_batch(read, folder):
    examples, _ = read(MIXED)
    data = Dataset(singles(examples), folder, config())
    assert len(data) == 9
    (batch,) = data.batches([4, 1])
    labels = [label for n in (4, 1) for label in examples[n].labels.tolist() if label != IGNORE]
    assert sorted(batch.labels[batch.labels != IGNORE].tolist()) == sorted(labels)


# ---------------------------------------------------------------- bad input


GOOD = record("good", "a.png", "<image>\nWhat is this?", "A star.")
BAD = {
    "roles out of order": (
        {"id": "x", "conversations": [{"from": who, "value": "A?"} for who in ("human", "human", "gpt")]},
        "conversations[1].from",
    ),
    "no gpt turn": (record("x", None, "What is this?"), "no gpt turn"),
    "empty answer": (record("x", None, "What is this?", "  "), "the answer is empty"),
    "no turns": ({"id": "x", "conversations": []}, "conversations"),
    "more marks than images": (record("x", ["a.png", "b.png"], "<image> <image> <image>?", "No."), "3 <image> marks"),
    "marks without image": (record("x", None, "<image>\nWhat?", "No."), "no image"),
    "missing image": (record("x", "nowhere.png", "<image>\nWhat?", "No."), "nowhere.png: the image does not exist"),
    "image name too long": (record("x", "n" * 300 + ".png", "<image>\nWhat?", "No."), "does not exist"),
    "empty image": (record("x", "zero.png", "<image>\nWhat?", "No."), "0 bytes"),
    "no image at all": (record("x", "text.png", "<image>\nWhat?", "No."), "not an image"),
    "one of two images missing": (record("x", ["a.png", "no.png"], "<image> <image>?", "No."), "no.png"),
    "escaping image": (record("x", "../a.png", "<image>\nWhat?", "No."), "leads out of the image folder"),
    "absolute image": (record("x", "/etc/a.png", "<image>\nWhat?", "No."), "leads out of the image folder"),
    "image is a number": ({**GOOD, "id": "x", "image": 7}, "image: must be a path"),
}


@pytest.fixture
def shelf(tmp_path, folder):
    """A folder with a good picture, an empty file and one that is no picture."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "a.png").write_bytes((folder / "a.png").read_bytes())
    (shelf / "b.png").write_bytes((folder / "b.png").read_bytes())
    (shelf / "zero.png").touch()
    (shelf / "text.png").write_text("not a picture")
    return shelf


@pytest.mark.parametrize(("bad", "words"), BAD.values(), ids=BAD)
def test_a_bad_record_is_named_with_its_fault_and_the_others_are_kept(bad, words, read, shelf):
    examples, report = read([GOOD, bad, GOOD], images=shelf)
    (line,) = report.problems
    assert line.startswith("record x: ") and words in line and "\n" not in line and line.count("record x") == 1
    assert len(examples) == 2 and report.records == 3


def test_every_bad_record_is_named_at_once(read, shelf):
    records = [{**bad, "id": f"x{number}"} for number, (bad, _) in enumerate(BAD.values())]
    _, report = read([GOOD, *records, GOOD], images=shelf)
    assert [line.split(":")[0] for line in report.problems] == [f"record x{n}" for n in range(len(BAD))]


@pytest.mark.parametrize("bad", ["a string", ["a list"], 7, None, {"conversations": "none"}, {}])
def test_a_record_without_id_is_named_by_its_number(bad, read):
    examples, report = read([GOOD, bad])
    assert len(examples) == 1 and report.problems[0].startswith("record number 1: ")


def test_an_image_that_many_records_miss_is_reported_for_each(read):
    lost = [record(name, "lost.png", "<image>\nWhat?", "No.") for name in ("x", "y")]
    assert [line[:8] for line in read(lost)[1].problems] == ["record x", "record y"]


def test_a_folder_called_records_hides_no_id(read, shelf, tmp_path, monkeypatch):
    shelf.rename(tmp_path / "records")
    monkeypatch.chdir(tmp_path)
    (line,) = read([record("x", "lost.png", "<image>\nWhat?", "No.")], images="records")[1].problems
    assert line.startswith("record x: records/lost.png")


def test_images_without_an_image_folder_are_an_error_that_says_what_to_add(read):
    (line,) = read([GOOD], images=None)[1].problems
    assert line.startswith("record good: ") and "--images" in line


def test_images_that_do_not_fit_are_an_error_and_not_cut(read, tokenizer):
    token_ids, _ = encode(messages_from_record(GOOD), tokenizer, "vicuna_v1", images=1)
    enough = token_ids.index(IMAGE) + N
    examples, report = read([GOOD], config(enough))  # but not for an answer
    assert (examples, report.named("cut"), report.named("lost"), report.problems) == ([], ["good"], ["good"], [])
    examples, report = read([GOOD], config(enough - 1))
    assert (examples, report.named("cut")) == ([], []) and len(report.problems) == 1
    room = f"record good: it takes {enough} positions to the end of its last image (1 in all), a row has {enough - 1};"
    assert report.problems[0] == f"{room} raise --max-length"


def test_the_length_that_is_named_counts_every_image_up_to_the_last(read):
    several = record("x", ["a.png", "b.png"], "<image> <image>?", "No. " * 40)
    needed = int(re.search(r"takes (\d+) positions .* \(2 in all\)", read([several], config(20))[1].problems[0])[1])
    assert [len(read([several], config(limit))[1].problems) for limit in (needed - 1, needed)] == [1, 0]


def test_captions_need_an_image(read):
    (line,) = read([record("x", None, "What?", "A ball.")], template="plain")[1].problems
    assert line.startswith("record x: ") and "<image>" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": 1}', "must be a JSON array"),
        (b"[]", "at least one"),
        (b'[{"id": 1}, {"id"', "not whole JSON"),
        (b"", "not whole JSON"),
        (b'[{"id": "\xff"}]', "not whole JSON"),
        (b"[" * 100_000, "not whole JSON"),
        (None, "cannot be read"),
    ],
    ids=["no list", "nothing in it", "cut in the middle", "zero bytes", "not text", "too deep", "missing"],
)
def test_a_file_that_is_no_list_of_records_is_an_error_that_names_it(content, words, tmp_path):
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Error, match=words) as caught:
        read_list(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "..", "a\\..\\x.jpg", "C:\\x.jpg"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name):
    with pytest.raises(Error, match="leads out"):
        image_path("images", name)


def test_names_of_the_official_files_stay_inside_the_folder():
    for name in ("000000000042.jpg", "coco/train2017/000000000042.jpg", "vg/VG_100K_2/1.jpg", "a..b.jpg", "./x.jpg"):
        assert image_path("images", name).resolve().is_relative_to(image_path("images", ".").resolve())


# ---------------------------------------------------------------- damage that only decoding shows


@pytest.fixture
def half(shelf):
    """A picture whose file breaks off behind its header."""
    content = (shelf / "a.png").read_bytes()
    (shelf / "half.png").write_bytes(content[: len(content) // 2])
    return shelf


def test_a_picture_that_breaks_off_is_skipped_with_a_line_and_counted(half, read, tokenizer, folder, capsys):
    one = record("x", "half.png", "<image>\nA?", "No.")
    two = record("y", ["b.png", "half.png"], "<image> <image>?", "No.")
    examples, report = read([GOOD, one, MIXED[1], two], images=half)
    assert len(examples) == 4 and report.problems == []  # its header is good
    data = Dataset(singles(examples), half, config())
    losses = [model().loss(batch) for batch in data.batches(range(4))]
    assert data.broken == {"half.png"}
    assert_same(loss_and_gradients(losses), one_by_one([GOOD, MIXED[1]], tokenizer, folder)[0])
    data.batches(range(4))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("skipped: ") and "half.png" in lines[0]


def test_a_batch_of_nothing_but_damage_is_empty(half, read):
    examples, _ = read([record("x", "half.png", "<image>\nWhat?", "No.")], images=half)
    data = Dataset(singles(examples), half, config())
    assert data.batches([0]) == [] and data.batches([0], rows_at_once=2) == []
