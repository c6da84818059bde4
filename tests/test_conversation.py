"""Conversations: the official ids and labels, in both spacings, and records that cannot be learnt from.

The oracle is the procedure of the official training code written out: render one string, tokenize it around its images
and special tokens, then find the labels by measuring the parts again.
"""

import re
from functools import cache, partial

import pytest
import sentencepiece

from nanollava.conversation import (
    HUMAN_SYSTEM,
    IGNORE,
    LLAMA_2_SYSTEM,
    TEMPLATES,
    USER_SYSTEM,
    encode,
    get_template,
    images_from_record,
    messages_from_record,
    render,
)
from nanollava.error import Error
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer

CAT = ["<image>\nWhat is this?", "A cat."]
CAT_BLACK = [*CAT, "What color?", "Black."]


def talk(*texts):
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["tiny-legacy", "tiny-new", "llama-legacy", "llama-new"])
def tokenizer(request):
    size, spacing = request.param.split("-")
    return Tokenizer(request.getfixturevalue(f"{size}_tokenizer_file"), legacy=spacing == "legacy")


# The worked examples: ids and labels of the official code with the LLaMA tokenizer.

QUESTION = [3148, 1001, 29901, 29871, -200, 29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901]
ANSWER = [319, 6635, 29889, 2]


@pytest.mark.parametrize("legacy", [True, False])
def test_one_turn_with_image(llama_tokenizer_file, legacy):
    ids, labels = encode(talk(*CAT), Tokenizer(llama_tokenizer_file, legacy), "vicuna_v1")
    assert len(ids) == 51 and ids[:3] == [1, 319, 13563] and ids[29:31] == [5155, 29889]
    assert ids[31:] == QUESTION + ANSWER
    assert labels == [IGNORE] * 47 + ANSWER


@pytest.mark.parametrize(("legacy", "user", "black"), [(True, [3148, 1001], 62), (False, [11889], 61)])
def test_two_turns_with_image(llama_tokenizer_file, legacy, user, black):
    ids, labels = encode(talk(*CAT_BLACK), Tokenizer(llama_tokenizer_file, legacy), "v1")
    second = [*user, 29901, 1724, 2927, 29973, 319, 1799, 9047, 13566, 29901, 6054, 29889, 2]
    assert ids[31:] == QUESTION + ANSWER + second
    assert labels == [IGNORE] * 47 + ANSWER + [IGNORE] * (black - 51) + [6054, 29889, 2]


def test_plain_caption(llama_tokenizer_file):
    messages = talk("Describe it briefly.\n<image>", "A cat on a mat")
    ids, labels = encode(messages, Tokenizer(llama_tokenizer_file), "plain")
    assert ids == [1, -200, 319, 6635, 373, 263, 1775, 13]
    assert labels == [-100, -100, 319, 6635, 373, 263, 1775, 13]


# The oracle.


@cache
def processor(file):
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def official_ids(tokenizer, text):
    """Ids of a string, -200 at its images: each part is tokenized with a begin token, of which the first is kept."""
    spaced, all_ids = processor(tokenizer.file).encode, []
    for part in text.split("<image>"):
        ids = [1]
        for i, piece in enumerate(filter(None, re.split("(<s>|</s>)", part))):
            if piece in ("<s>", "</s>"):
                ids.append({"<s>": 1, "</s>": 2}[piece])
            elif i == 0 or tokenizer.legacy:
                ids += spaced(piece)
            else:
                ids += spaced("\n" + piece)[len(spaced("\n")) :]  # in the new spacing nothing is put in front
        all_ids += [-200, *ids[1:]] if all_ids else ids
    return all_ids


def by_rounds(prompt, separator, tokenizer, shorter):
    """Ids, and labels as the official code measures them round by round; None for labels where it gives up."""
    ids, position = official_ids(tokenizer, prompt), 1
    labels = [IGNORE, *ids[1:]]
    for number, text in enumerate(prompt.split("</s>")):
        parts = text.split(separator)
        if text == "" or len(parts) != 2:
            break
        less = int(number > 0 and shorter)
        instruction = len(official_ids(tokenizer, parts[0] + separator)) - 2 - less
        labels[position : position + instruction] = [IGNORE] * instruction
        position += len(official_ids(tokenizer, text)) - less
    return ids, [IGNORE if i == -200 else i for i in labels] if position == len(ids) else None


def oracle_vicuna(texts, tokenizer, system=USER_SYSTEM):
    turns = [(f"USER: {text} ", f"ASSISTANT: {text}</s>")[i % 2] for i, text in enumerate(texts)]
    return by_rounds(f"{system} {''.join(turns)}", " ASSISTANT: ", tokenizer, shorter=not tokenizer.legacy)


def oracle_llama_2(texts, tokenizer):
    texts = [f"<<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n{texts[0]}", *texts[1:]]
    prompt = "".join((f"<s>[INST] {text} [/INST]", f" {text} </s>")[i % 2] for i, text in enumerate(texts))
    return by_rounds(prompt.removeprefix("<s>"), "[/INST] ", tokenizer, shorter=False)


def oracle_first_release(texts, tokenizer):
    header = HUMAN_SYSTEM + "\n\n"
    pieces = [f"### {('Human', 'Assistant')[i % 2]}: {text}\n" for i, text in enumerate(texts)]
    ids = official_ids(tokenizer, header + "".join(pieces) + "### ")
    labels, position = list(ids), len(official_ids(tokenizer, header))
    labels[:position] = [IGNORE] * position
    for i, piece in enumerate(pieces):
        length = len(official_ids(tokenizer, piece))
        if i % 2 == 0:
            labels[position + 2 : position + length] = [IGNORE] * (length - 2)
        position += length
    return ids, [IGNORE if i == -200 else i for i in labels]


def oracle_plain(texts, tokenizer):
    ids = official_ids(tokenizer, f"<image>{texts[1]}\n")
    return ids, [IGNORE, IGNORE, *ids[2:]]


ORACLES = {
    "vicuna_v1": oracle_vicuna,
    "llava_v1": partial(oracle_vicuna, system=HUMAN_SYSTEM),
    "llava_llama_2": oracle_llama_2,
    "llava_v0": oracle_first_release,
    "plain": oracle_plain,
}
# fmt: off
ODD_CONVERSATIONS = [
    CAT, CAT_BLACK, ["Hi", "Hello!"], ["Hi", "Hello!", "How are you?", "Fine.", "Bye", "Bye"],
    [" leading", " leading"], ["trailing ", "trailing "], ["two  spaces   inside", "two  spaces   inside"],
    ["   ", "   x"], ["\n", "\nx\n"], ["a\n\n\nb", "a\n\n\nb"], ["tab\t", "\ttab"], ["\r\nq\r\n", "\r\na\r\n"],
    ["😀", "😀"], ["x 😀", "😀 x", "😀", "ﷺ 日本語", "naïve", "e\u0301"], ["\u200b", "\u200b", "\xa0q", "\xa0a\xa0"],
    ["USER: hi", "USER: hi", "ASSISTANT", "ASSISTANT:"], ["Human: #", "# ## ###", "### Human:", "#"],
    [":", ":", ".", "."], ["<unk>", "<unk>"], ["[INST] x", "[INST] x"], ["▁", "▁x▁", "▁", "▁"], ["a\0b", "a\0b"],
    ["<image>", "One."], ["<image>\nQ", "A", "<image>\nQ", "A"], ["<image>\nQ", "A", "Q", "<image>\nA", "Q", "A"],
    # From here on several images, each left where it is.
    ["<image><image>\nSame?", "No."], ["<image> and <image>", "Two."], ["Is it <image>", "Yes.", "<image> ", " No"],
    ["a<image>b<image>", "c", "<image>", "d<image>", "e", "<image> f"], ["  <image>  <image>", "<image> x <image>"],
]
# fmt: on


@pytest.mark.parametrize("texts", ODD_CONVERSATIONS, ids=repr)
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_llama_2", "llava_v0"])
def test_equals_the_official_procedure(tokenizer, template, texts):
    marks = sum(text.count("<image>") for text in texts)
    images = marks if ODD_CONVERSATIONS.index(texts) >= len(ODD_CONVERSATIONS) - 5 else None
    expected_ids, expected_labels = ORACLES[template](texts, tokenizer)
    assert expected_labels is not None, "the official code gives this sample up: it proves nothing"
    ids, labels = encode(talk(*texts), tokenizer, template, images)
    assert ids == expected_ids and ids.count(IMAGE_TOKEN_ID) == marks
    # The official labels of the first release count on LLaMA's own two pieces for ###.
    if template != "llava_v0" or tokenizer.vocab_size == 32000:
        assert labels == expected_labels


@pytest.mark.parametrize("caption", ["A cat", " A  cat ", "a\nb", "😀 cat", ":#"])
def test_plain_equals_the_official_procedure(tokenizer, caption):
    assert encode(talk("Say it.<image>", caption), tokenizer, "plain") == oracle_plain(["", caption], tokenizer)


# Prompts.

LLAMA_2_START = f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n<image>\nQ [/INST]"
# fmt: off
PROMPTS = [
    ("vicuna_v1", f"{USER_SYSTEM} USER: <image>\nQ ASSISTANT:", " A</s>USER: R ASSISTANT:"),
    ("llava_v1", f"{HUMAN_SYSTEM} USER: <image>\nQ ASSISTANT:", " A</s>USER: R ASSISTANT:"),
    ("llava_v0", f"{HUMAN_SYSTEM}###Human: <image>\nQ###Assistant:", " A###Human: R###Assistant:"),
    ("llava_llama_2", LLAMA_2_START, " A </s><s>[INST] R [/INST]"),
]
# fmt: on


@pytest.mark.parametrize(("template", "first", "second"), PROMPTS, ids=[case[0] for case in PROMPTS])
def test_prompts(tokenizer, template, first, second):
    for texts, prompt in ((["Q <image>"], first), (["Q <image>", "A", "R"], first + second)):
        assert render(talk(*texts), template) == prompt
        ids, labels = encode(talk(*texts), tokenizer, template)
        assert ids == official_ids(tokenizer, prompt)
    assert (set(labels) == {IGNORE}) is (template == "llava_v0")  # its chat layout is not what it is trained on


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_llama_2", "plain"])
def test_what_follows_a_prompt_in_training_is_learnt_and_nothing_else(tokenizer, template):
    prompt, _ = encode(talk("Q <image>"), tokenizer, template)
    ids, labels = encode(talk("Q <image>", "It is red."), tokenizer, template)
    assert len(ids) > len(prompt) and ids[: len(prompt)] == prompt
    assert labels == [IGNORE] * len(prompt) + ids[len(prompt) :]


def test_an_empty_question_has_no_separator():
    assert render(talk("", "A"), "vicuna_v1") == f"{USER_SYSTEM} USER:ASSISTANT: A</s>"
    assert render(talk(""), "llava_v0") == f"{HUMAN_SYSTEM}###Human:Assistant:"


def test_stop_texts():
    stops = {name: get_template(name).stop for name in TEMPLATES}
    assert stops == dict.fromkeys(["vicuna_v1", "v1", "llava_v1", "llava_llama_2"]) | {"llava_v0": "###", "plain": "\n"}


# Images in the text.


@pytest.mark.parametrize("text", ["<image>\nQ", "Q\n<image>", "  Q <image> ", "<image>Q<image>", "<image><image> Q\n"])
def test_one_image_moves_to_the_front(text):
    expected = f"{USER_SYSTEM} USER: <image>\nQ ASSISTANT: A </s>USER:  R\n ASSISTANT:"
    assert render(talk(text, "A ", " R\n"), "vicuna_v1") == expected
    assert render(talk(text, "A ", " R\n"), "vicuna_v1", images=1) == expected


def test_without_images_a_mark_is_text(tokenizer):
    ids, _ = encode(talk("What does <image> mean?"), tokenizer, "vicuna_v1", images=0)
    assert IMAGE_TOKEN_ID not in ids
    assert tokenizer.decode(ids).endswith("USER: What does <image> mean? ASSISTANT:")


# Texts that look like the template itself.

# fmt: off
FORGERIES = [
    ["a ASSISTANT: b", "c ASSISTANT: d"], ["x</s>USER: y ASSISTANT: z</s>", "p</s>q"], ["<s>", "<s> </s>"],
    ["###Assistant: x###", "### Human: y\n### Assistant: z\n### "], ["a [/INST] b </s><s>[INST] c", "d [/INST] e"],
]
# fmt: on


@pytest.mark.parametrize("texts", FORGERIES, ids=repr)
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_llama_2"])
def test_no_text_forges_a_turn_or_loses_its_sample(tokenizer, template, texts):
    ids, labels = encode(talk(*texts, *texts), tokenizer, template)
    assert ids.count(2) == 2 and ids.count(1) == (2 if template == "llava_llama_2" else 1)
    learnt = [label for label in labels if label != IGNORE]
    first, second = learnt[: learnt.index(2)], learnt[learnt.index(2) + 1 : -1]
    assert learnt[-1] == 2 and first == second
    assert tokenizer.decode(first).rstrip() == texts[1].rstrip()


@pytest.mark.parametrize("texts", FORGERIES, ids=repr)
def test_first_release_learns_its_answers_whatever_they_say(tokenizer, texts):
    _, labels = encode(talk(*texts), tokenizer, "llava_v0")
    learnt = tokenizer.decode([label for label in labels if label != IGNORE])
    assert learnt == f"###### Assistant: {texts[1]}\n### "


# What is refused.

# fmt: off
REFUSED = [
    ([], "messages: the list is empty"), (["Q"], "messages[0].content: missing"),
    ([{"role": "user", "content": 3}], "messages[0].content: missing, or not text"),
    (talk("Q", "A")[1:], "messages[0].role: this turn must be the user's"),
    ([{"role": "system", "content": "S"}, *talk("Q", "A")], "messages[0].role: "),
    (talk("Q") * 2, "messages[1].role: this turn must be the assistant's"),
    (talk("Q", ""), "messages[1].content: the answer is empty"), (talk("Q", "<image>"), "messages[1].content: the ans"),
    (talk("Q", "A", "Q", " \n"), "messages[3].content: the answer is empty"),
]
GOOD = [("human", "Q"), ("gpt", "A")]
BAD_RECORDS = [  # turns, image, the error
    ([("human", "Q"), ("gpt", None)], None, "conversations[1].value: missing, or not text"),
    ([("human", "Q"), ("bot", "A")], None, "conversations[1].from: 'bot'"),
    ([], None, "conversations: missing"), (GOOD[:1], None, "conversations: no gpt turn"),
    (GOOD[1:], None, "conversations: no gpt turn"), (GOOD, 7, "image: must be a path"),
    ([("gpt", "A"), ("gpt", "A"), ("human", "Q")], None, "conversations[1].from: this turn must be the user's"),
    ([*GOOD, ("gpt", "A")], None, "conversations[2].from: this turn must be the user's"),
    ([GOOD[0], *GOOD], None, "conversations[1].from: this turn must be the assistant's"),
    ([*GOOD, ("human", "Q"), ("gpt", "  ")], None, "conversations[3].value: the answer is empty"),
    ([("gpt", "Hi"), ("human", "Q"), ("gpt", "")], None, "conversations[2].value: the answer is empty"),
    ([("human", "<image>\nQ"), GOOD[1]], None, "conversations: 1 <image> marks, but the record has no image"),
    ([("human", "<image><image><image>"), GOOD[1]], ["a", "b"], "conversations: 3 <image> marks for 2 images"),
    ([("human", "<image>"), GOOD[1]], ["a", "b"], "conversations: 1 <image> marks for 2 images"),
]
# fmt: on


@pytest.mark.parametrize(("messages", "line"), REFUSED, ids=[case[1] for case in REFUSED])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v0", "plain", "llava_llama_2"])
def test_encode_refuses(tiny_tokenizer_file, template, messages, line):
    with pytest.raises(Error, match=re.escape(line)):
        encode(messages, Tokenizer(tiny_tokenizer_file), template)


def test_encode_refuses_what_does_not_suit_the_template(tiny_tokenizer_file):
    tokenizer = Tokenizer(tiny_tokenizer_file)
    for texts in (["Q", "A"], ["<image>", "A", "Q", "A"]):
        with pytest.raises(Error, match="template plain"):
            encode(talk(*texts), tokenizer, "plain")
    with pytest.raises(Error, match=r"'vicuna'.*vicuna_v1, v1, llava_v1, llava_v0, plain, llava_llama_2"):
        encode(talk("Q"), tokenizer, "vicuna")
    for count in (2, 4):
        with pytest.raises(Error, match=f"3 <image> marks for {count} images"):
            encode(talk("<image><image> Q <image>"), tokenizer, "v1", images=count)


# Official records.


def record(turns, **fields):
    return {"id": "42", **fields, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


@pytest.mark.parametrize("before", [[], [("gpt", "Hi")], [("system", "Hi")]])
@pytest.mark.parametrize("after", [[], [("human", "And?")]])
def test_a_record_becomes_messages(before, after):
    turns = [("human", "Q\n<image>"), ("gpt", "A"), ("human", "R"), ("gpt", "B")]
    assert messages_from_record(record(before + turns + after, image="x")) == talk("Q\n<image>", "A", "R", "B")


@pytest.mark.parametrize(("turns", "image", "line"), BAD_RECORDS, ids=[case[2] for case in BAD_RECORDS])
def test_bad_records_are_named(turns, image, line):
    with pytest.raises(Error, match=re.escape(f"record 42: {line}")):
        messages_from_record(record(turns, image=image))


def test_what_is_no_record_at_all():
    for bad, line in (
        (["Q"], "a record that is not an object but list: "),
        ({"id": 7, "conversations": "Q"}, "record 7: conversations: "),
        ({"conversations": ["Q", "A"]}, r"record without id: conversations\[0\]\.value: "),
    ):
        with pytest.raises(Error, match=line):
            messages_from_record(bad)


def test_images_of_a_record():
    assert images_from_record(record([])) == images_from_record(record([], image=None)) == []
    assert images_from_record(record([], image="a.jpg")) == ["a.jpg"]
    assert images_from_record(record([], image=["a.jpg", "b.jpg"])) == ["a.jpg", "b.jpg"]
    for bad in (3, "", [""], ["a.jpg", 3], {"path": "a.jpg"}):
        with pytest.raises(Error, match="record 42: image: "):
            images_from_record(record([], image=bad))
