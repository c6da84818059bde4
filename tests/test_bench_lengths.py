"""The lengths that training is timed on are those of the published files, and length-grouped batches are what they
are called."""

import json
import random

import pytest

from nanollava.bench.lengths import LENGTHS, length_grouped, records
from nanollava.tokenizer import Tokenizer


def test_lengths_are_those_of_the_published_questions_and_answers(fixtures, llama_tokenizer_file):
    tokenizer = Tokenizer(llama_tokenizer_file)

    def texts(name: str) -> dict[int, str]:
        lines = (fixtures / "llava_bench_coco" / name).read_text(encoding="utf-8").splitlines()
        return {entry["question_id"]: entry["text"] for entry in map(json.loads, lines)}

    questions, answers = texts("qa90_questions.jsonl"), texts("qa90_gpt4_answer.jsonl")
    assert questions.keys() == answers.keys()
    count = lambda text: len(tokenizer.encode(text, bos=False))  # noqa: E731
    assert tuple((count(questions[n]), count(answers[n])) for n in sorted(questions)) == LENGTHS


def test_conversations_have_one_to_five_turns_of_these_lengths():
    drawn = records(2000, seed=1)
    assert len(drawn) == 2000 and {turn for turns in drawn for turn in turns} == set(LENGTHS)
    counts = [sum(len(turns) == n for turns in drawn) for n in range(1, 6)]
    assert sum(counts) == 2000 and min(counts) > 300
    assert records(2000, seed=1) == drawn != records(2000, seed=2) and records(0, seed=1) == []


@pytest.mark.parametrize(("count", "with_image", "size"), [(1000, 0.9, 8), (100, 0.5, 7), (5, 1.0, 8), (64, 0.0, 8)])
def test_every_record_is_in_one_batch_and_the_kinds_are_apart_but_in_the_remainder(count, with_image, size):
    draw = random.Random(0)
    lengths = [draw.randint(50, 2000) for _ in range(count)]
    images = [draw.random() < with_image for _ in range(count)]
    batches = length_grouped(lengths, images, size, seed=3)
    assert sorted(n for batch in batches for n in batch) == list(range(count))
    assert {len(batch) for batch in batches[:-1]} <= {size} and 1 <= len(batches[-1]) <= size
    mixed = [batch for batch in batches if len({images[n] for n in batch}) == 2]
    assert len(mixed) <= 2 and mixed in (batches[len(batches) - len(mixed) :], batches[-2:-1], batches[-1:], [])
    assert length_grouped(lengths, images, size, seed=3) == batches
    assert count < 20 or length_grouped(lengths, images, size, seed=4) != batches


def test_a_megabatch_worked_by_hand():
    """Six records, two in a batch, all in one megabatch: neighbours in length together."""
    batches = length_grouped([10, 60, 30, 20, 50, 40], [True] * 6, 2, seed=0, megabatch=3)
    assert sorted(batches) == [[1, 4], [3, 0], [5, 2]]


def test_lengths_within_a_batch_are_close_and_padding_is_a_fraction_of_that_of_shuffled_ones():
    draw = random.Random(0)
    lengths = [draw.randint(100, 1100) for _ in range(4000)]

    def padding(megabatch: int) -> float:
        batches = length_grouped(lengths, [True] * 4000, 10, 0, megabatch)
        return 1 - sum(lengths) / sum(len(batch) * max(lengths[n] for n in batch) for batch in batches)

    assert padding(1) > 0.35 and padding(8) < 0.12 and padding(50) < 0.03
    spread = [max(x) - min(x) for x in ([lengths[n] for n in b] for b in length_grouped(lengths, [True] * 4000, 10, 0))]
    assert sum(spread) / len(spread) < 1.5 * 1000 / 8  # of 80 in a megabatch each batch has an eighth of the range
