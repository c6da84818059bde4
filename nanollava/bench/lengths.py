"""How long the records are that training is timed on, and the padded batching that packing is compared with.

LENGTHS are those of LLaVA-Bench (COCO), 30 images with a question each of conversation, description and reasoning
(LLaVA section 5.1), and of GPT-4's answers, in tokens of LLaMA's tokenizer; numbers only. With the two official files
and the official ``tokenizer.model`` in a folder they are made so:

    tokenizer = nanollava.load_tokenizer(folder)
    files = [(folder / name).read_text().splitlines() for name in ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl")]
    texts = [[json.loads(line)["text"] for line in lines] for lines in files]
    LENGTHS = tuple(tuple(len(tokenizer.encode(text, bos=False)) for text in pair) for pair in zip(*texts))
"""

import random

# fmt: off
LENGTHS = (  # (tokens of the question, tokens of the answer)
    (13, 18), (13, 95), (10, 179), (12, 30), (6, 126), (18, 161), (9, 21), (7, 91), (15, 132), (9, 8), (6, 104),
    (16, 176), (12, 16), (6, 135), (18, 234), (11, 10), (11, 97), (18, 173), (9, 20), (11, 73), (12, 121), (10, 30),
    (7, 128), (16, 100), (11, 10), (12, 130), (25, 253), (11, 11), (9, 115), (16, 153), (9, 42), (12, 76), (12, 106),
    (13, 11), (9, 107), (15, 140), (9, 24), (7, 72), (17, 106), (11, 35), (12, 116), (11, 177), (9, 25), (11, 112),
    (19, 148), (17, 49), (8, 90), (18, 147), (11, 13), (9, 71), (14, 147), (11, 15), (9, 76), (14, 151), (16, 17),
    (12, 117), (13, 130), (9, 24), (12, 124), (20, 129), (10, 10), (9, 118), (21, 140), (13, 13), (11, 82), (16, 153),
    (12, 27), (9, 97), (15, 174), (12, 12), (9, 82), (16, 224), (17, 22), (11, 54), (15, 150), (9, 15), (9, 166),
    (10, 91), (10, 29), (6, 117), (23, 140), (14, 57), (12, 111), (15, 140), (13, 29), (11, 90), (9, 119), (13, 23),
    (12, 147), (18, 138),
)
# fmt: on


def records(count: int, seed: int) -> list[list[tuple[int, int]]]:
    """``count`` one-image conversations of 1 to 5 turns, as the lengths (question, answer) of their turns in tokens.

    All numbers of turns, and all of LENGTHS, are equally frequent. What image and template take comes on top.
    """
    draw = random.Random(seed)
    return [draw.choices(LENGTHS, k=draw.randint(1, 5)) for _ in range(count)]


def length_grouped(
    lengths: list[int], has_image: list[bool], batch_size: int, seed: int, megabatch: int = 8
) -> list[list[int]]:
    """Record numbers in batches of which padding, to the longest of each, wastes little: LengthGroupedSampler of
    transformers, with records of text alone kept apart from those with an image (LLaVA-1.5's
    ``--group_by_modality_length``).

    Each kind is shuffled, cut into megabatches of ``megabatch`` batches, sorted by length within each, and cut into
    batches, which are shuffled; the remainders, less than a batch of each kind, come together in the end. The official
    code has a batch for each GPU and accumulation step in a megabatch: 8 on its machine, and 1, so that nothing is
    grouped, on one GPU. It also deals a sorted megabatch to the GPUs so that each gets as much, the longest too, which
    pads more; ours, cut in the order of lengths as transformers does, is the harder one to beat.
    """
    draw, batches, remainder = random.Random(seed), [], []
    for kind in (True, False):
        numbers = [n for n, image in enumerate(has_image) if image == kind]
        draw.shuffle(numbers)
        whole = len(numbers) // batch_size * batch_size
        remainder += numbers[whole:]
        for start in range(0, whole, megabatch * batch_size):
            part = numbers[start : min(start + megabatch * batch_size, whole)]
            part.sort(key=lambda n: -lengths[n])
            batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    draw.shuffle(batches)
    return batches + [remainder[i : i + batch_size] for i in range(0, len(remainder), batch_size)]
