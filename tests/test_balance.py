"""The paper's filter of captions: the choice against a plain rewriting of the paper's sentences, phrases against
sentences worked by hand, the command as it is typed."""

import json
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from nanollava.instruct import balance, journal, phrases
from nanollava.instruct.__main__ import main
from nanollava.instruct.balance import choose
from nanollava.instruct.phrases import simple_phrases, spacy_phrases


def draw(seed: int, captions: int = 400, words: int = 60) -> list[set[str]]:
    """Captions as sets of phrases, few of them in most captions and most in few."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(words)]
    return [set(rng.choices([f"p{n}" for n in range(words)], weights, k=rng.randint(0, 4))) for _ in range(captions)]


# ---------------------------------------------------------------- the choice


def slowly(found: list[set[str]], least: int, most: int, seed: int) -> set[int]:
    """The paper's sentences one after the other, with nothing but lists and sets."""
    frequency = Counter(phrase for phrases in found for phrase in phrases)
    rng, pool = random.Random(seed), set()
    for phrase, count in sorted(frequency.items(), key=lambda item: (item[1], item[0])):
        if count < least:
            continue
        owners = [number for number, phrases in enumerate(found) if phrase in phrases]
        pool |= set(owners if count <= most else [owners[i] for i in rng.sample(range(count), most)])
    return pool


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_that_of_the_papers_sentences(seed):
    found = draw(seed)
    for least, most in ((3, 100), (1, 10), (5, 5), (30, 20)):
        choice = choose(found, least, most, seed)
        kept = {i for i, yes in enumerate(choice.kept) if yes}
        assert kept == slowly(found, least, most, seed) and kept
        after = {phrase: sum(phrase in found[i] for i in kept) for phrase in choice.phrases}
        assert dict(zip(choice.phrases, choice.after.tolist(), strict=True)) == after
        assert dict(zip(choice.phrases, choice.before.tolist(), strict=True)) == Counter(p for f in found for p in f)


def test_worked_by_hand():
    """rare: 2 captions, skipped; cat: 3, all stay; dog: 7, of which 4 are drawn. One with no phrase at all goes."""
    found = [{"rare"}, {"rare", "cat"}, {"cat"}, {"cat", "dog"}, *({"dog"} for _ in range(6)), set()]
    choice = choose(found, least=3, most=4, seed=1)
    kept = choice.kept.tolist()
    assert kept[:4] == [False, True, True, True] and kept[10] is False
    drawn = random.Random(1).sample(range(7), 4)  # of the captions 3 to 9
    assert kept[4:10] == [i in drawn for i in range(1, 7)]
    counts = dict(zip(choice.phrases, zip(choice.before.tolist(), choice.after.tolist(), strict=True), strict=True))
    assert counts["rare"] == (2, 1) and counts["cat"] == (3, 3) and counts["dog"] == (7, 1 + sum(kept[4:10]))


def test_what_is_rare_stays_whole_and_what_is_frequent_shrinks():
    found = draw(3, captions=3000, words=25)
    choice = choose(found, 3, 50)
    for before, after in zip(choice.before, choice.after, strict=True):
        assert after == before if 3 <= before <= 50 else after >= min(before, 50) or before < 3
    assert choice.after.max() < choice.before.max() / 2


def test_a_seed_draws_the_same_again_and_another_draws_others():
    found = draw(0)
    first, again, other = (choose(found, 3, 10, seed).kept.tolist() for seed in (1, 1, 2))
    assert first == again != other


# ---------------------------------------------------------------- phrases

SENTENCES = {
    "A donut shop is full of different flavors of donuts.": {"donut shop", "different flavors", "donuts"},
    "A car parked by a parking meter in front of a building.": {"car", "parking meter", "building"},
    "A black and white photo of the old man": {"black and white photo", "old man"},
    "an orange and white cat is laying next to a keyboard and some wires": {
        "orange and white cat",
        "keyboard",
        "wires",
    },
    "A man rides a horse through the river": {"man", "horse", "river"},
    "A dog takes a walk.": {"dog", "walk"},
    "A duck walking along a paved road next to a patch of grass.": {"duck", "paved road", "patch", "grass"},
    "Two buses are parked against a curb": {"two buses", "curb"},
    "A large, brown dog, a cat and 3 birds": {"large brown dog", "cat", "3 birds"},
    "A woman's midsection reflected in a round mirror.": {"woman's midsection", "round mirror"},
    "A living room with lots of furniture": {"living room", "lots", "furniture"},
    "THE TIE THAT IS SITTING ON TOP OF A SHIRT": {"tie", "top", "shirt"},
    "It is quickly standing there, and they like the red ones": {"red ones"},
    "a man , a woman , and the child": {"man", "woman", "child"},
    "There are four giraffes standing among some dry brush": {"four giraffes", "dry brush"},
    "Wheeled cart with luggage at lobby": {"cart", "luggage", "lobby"},
    "über café ☕ 犬": {"über café", "犬"},
    "the red": set(),
    "the": set(),
    "": set(),
    "...": set(),
}


@pytest.mark.parametrize(("text", "expected"), SENTENCES.items())
def test_sentences_worked_by_hand(text, expected):
    assert simple_phrases(text) == expected


def test_the_same_thing_in_other_words_is_one_phrase():
    told = ("A red bus.", "the RED bus", "his red  bus is here", "some red\nbus")
    assert [simple_phrases(text) for text in told] == [{"red bus"}] * 4


def test_real_captions(fixtures):
    """All captions of 80 images: nearly all have phrases, each of them words of the caption that name something."""
    lines = (fixtures / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    assert len(captions) > 400
    found = [simple_phrases(caption) for caption in captions]
    assert sum(map(bool, found)) >= 0.99 * len(captions)
    for caption, names in zip(captions, found, strict=True):
        plain = " ".join(re.findall(r"[\w'’-]+", caption.lower()))
        assert all(name in plain for name in names) and len(names) <= 8, caption
        lasts = {name.split()[-1] for name in names}
        silent = phrases.POINTING | phrases.BETWEEN | phrases.DESCRIBING
        assert not lasts & silent, caption
    counts = Counter(name for names in found for name in names)
    assert counts["man"] > 20 and counts["woman"] > 5 and counts["building"] >= 5
    choice = choose(found, 3, 10)
    assert 0 < choice.kept.sum() < len(captions)


# ---------------------------------------------------------------- spaCy, by its documented interface


class FakeSpacy:
    """What is documented: load(name, disable=), nlp.has_pipe, nlp.pipe(texts, n_process=), doc.noun_chunks,
    chunk.text, chunk.root.pos_. A chunk is what stands between bars here."""

    def __init__(self, parser: bool = True):
        self.parser, self.loaded = parser, []

    def load(self, name, disable=()):
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model '{name}'.\nIt is not there.")
        self.loaded.append((name, tuple(disable)))
        return self

    def has_pipe(self, name):
        return name == "parser" and self.parser

    def pipe(self, texts, n_process=1):
        for text in texts:
            parts = [part for part in text.split("|") if part]
            kinds = ["PRON" if part in ("It", "they") else "NOUN" for part in parts]
            roots = [SimpleNamespace(pos_=kind) for kind in kinds]
            chunks = [SimpleNamespace(text=t, root=r) for t, r in zip(parts, roots, strict=True)]
            yield SimpleNamespace(noun_chunks=iter(chunks))


def test_noun_chunks_of_spacy_are_made_one_by_case_and_pointing_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", FakeSpacy())
    found = list(spacy_phrases(["The Red bus|It|a red bus|these", "they", "Two  dogs|the"]))
    assert found == [{"red bus"}, set(), {"two dogs"}]


@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        (None, (), "spaCy is not installed; pip install"),
        (FakeSpacy(), ("--spacy-model", "de_big"), "python -m spacy download de_big"),
        (FakeSpacy(parser=False), (), "has no parser"),
    ],
)
def test_what_spacy_lacks_is_one_line(module, words, told, records, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spacy", module)
    assert main(["balance", str(records), "--dry-run", "--finder", "spacy", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and told in error and error.count("\n") == 1


# ---------------------------------------------------------------- the command

CAPTIONS = ["a dog on a beach", "a dog in the snow", "the dog", "a cat", "the dog and a cat", "a quokka", "a cat naps"]


@pytest.fixture
def records(tmp_path):
    """CC3M's chat.json in small."""
    file = tmp_path / "chat.json"
    turns = [[{"from": "human", "value": "Say it.\n<image>"}, {"from": "gpt", "value": text}] for text in CAPTIONS]
    content = [{"id": f"GCC_{n}", "image": f"GCC_{n}.jpg", "conversations": turn} for n, turn in enumerate(turns)]
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def coco(tmp_path):
    """Two captions of each image but the last."""
    file = tmp_path / "captions_train.json"
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
    annotations = [{"id": 10 + n, "image_id": n // 2, "caption": text} for n, text in enumerate(CAPTIONS)]
    file.write_text(json.dumps({"info": {"year": 2014}, "images": images, "annotations": annotations}))
    return file


def test_records_are_kept_as_they_are(records, tmp_path, capsys):
    """dog 4 times, cat 3 times; beach, snow and quokka once each."""
    out = tmp_path / "new" / "kept.json"
    assert main(["balance", str(records), "--out", str(out)]) == 0
    before = json.loads(records.read_text())
    assert json.loads(out.read_text()) == [before[n] for n in (0, 1, 2, 3, 4, 6)]
    printed = capsys.readouterr().out
    assert "7 captions" in printed and "5 different" in printed and "skipped: 3" in printed
    assert "captions kept: 6 of 7 (85.7%)" in printed and "dog: 4 before, 4 after" in printed
    assert list(out.parent.iterdir()) == [out]


def test_captions_of_coco_stay_a_file_of_cocos(coco, tmp_path):
    out = tmp_path / "kept.json"
    assert main(["balance", str(coco), "--out", str(out), "--least", "4"]) == 0
    kept, before = json.loads(out.read_text()), json.loads(coco.read_text())
    assert kept["annotations"] == [before["annotations"][n] for n in (0, 1, 2, 4)]
    assert kept["images"] == before["images"][:3] and kept["info"] == before["info"]


def test_the_cap_and_the_seed(records, tmp_path):
    def kept(*words):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        assert main(["balance", str(records), "--out", str(out), "--most", "1", *words]) == 0
        return out.read_text()

    assert kept() == kept("--seed", "0") and len({kept("--seed", str(seed)) for seed in range(8)}) > 1
    assert len(json.loads(kept())) <= 2


def test_a_dry_run_writes_nothing(records, tmp_path, capsys):
    assert main(["balance", str(records), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == [records] and "captions kept: 6 of 7" in capsys.readouterr().out


BAD = {
    "no file": (None, (), "cannot be read"),
    "half a file": ('{"annotations": [{"cap', (), "cannot be read as JSON"),
    "half a list": ('[{"id": ', (), "not whole JSON"),
    "no captions": ('{"images": []}', (), '"annotations" is missing'),
    "instances": ('{"images": [], "annotations": [{"bbox": [0, 0, 1, 1]}]}', (), 'annotations[0] has no "caption"'),
    "no images": ('{"annotations": [{"caption": "a"}]}', (), '"images" is missing'),
    "no records": ("[]", (), "at least one in it"),
    "a record without answer": ('[{"id": "x7", "conversations": []}]', (), "record x7: conversations"),
    "no object": ("[7]", (), "not an object but int"),
    "nothing frequent": (None, ("--least", "9"), "lower --least"),
    "no least": (None, ("--least", "0"), "--least is 0"),
    "no most": (None, ("--most", "0"), "--most is 0"),
    "no out": (None, (), "give --out FILE"),
}


@pytest.mark.parametrize(("content", "words", "told"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(content, words, told, records, tmp_path, capsys):
    file, out = records, tmp_path / "out.json"
    if content is not None:
        file.write_text(content)
    if told == "cannot be read":
        file.unlink()
    output = () if told.startswith("give --out") else ("--out", str(out))
    assert main(["balance", str(file), *output, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1 and not out.exists()


def test_what_is_there_is_not_overwritten_and_a_disk_that_refuses_leaves_nothing(
    records, tmp_path, capsys, monkeypatch
):
    content = records.read_text()
    assert main(["balance", str(records), "--out", str(records)]) == 2
    assert "is there already" in capsys.readouterr().err and records.read_text() == content
    monkeypatch.setattr(journal.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert main(["balance", str(records), "--out", str(tmp_path / "full.json")]) == 2
    assert "full.json: cannot be written (No space left)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [records]


def test_ctrl_c_writes_nothing(records, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(balance, "choose", interrupted)
    assert main(["balance", str(records), "--out", str(tmp_path / "out.json")]) == 130
    assert "nothing was written" in capsys.readouterr().err and list(tmp_path.iterdir()) == [records]


def test_as_it_is_typed(records, tmp_path, capsys):
    """A command of python -m nanollava.instruct, whose result is kept whole when it is given back to it."""
    with pytest.raises(SystemExit) as ended:
        main(["balance", "--help"])
    assert ended.value.code == 0 and "--finder" in capsys.readouterr().out
    once, twice = tmp_path / "once.json", tmp_path / "twice.json"
    assert main(["balance", str(records), "--out", str(once)]) == 0
    assert main(["balance", str(once), "--out", str(twice)]) == 0
    assert once.read_text() == twice.read_text() and main(["balance", str(once), "--out", str(twice)]) == 2
