"""The miniature world: what is drawn, what is said of it, what is kept apart."""

import json
import math
import random
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanollava.conversation import IGNORE, messages_from_record
from nanollava.error import Error
from nanollava.evaluate import miniature as evaluation
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.miniature import language, pretrain, scenes, teacher, world
from nanollava.miniature.language import KINDS, NUMBERS
from nanollava.miniature.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, draw, random_scene
from nanollava.tokenizer import Tokenizer

SCENE = Scene((Thing(0, "large", "red", "star"), Thing(2, "small", "red", "heart"), Thing(7, "small", "blue", "star")))


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.build(folder, world.WorldSize(train=80, val=12, test=24, text=30, records=8))
    return folder


def some_scenes(count: int, split: str = "train") -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng, split) for _ in range(count)]


LONGEST_FIRST = "|".join(sorted(PLACES, key=len, reverse=True))  # "at the top left" is not "at the top"
CAPTIONED = re.compile(
    rf"\ban? (?:(\w+) (\w+) )?({'|'.join(SHAPES)})\b(?: ({LONGEST_FIRST}))?(?: that is (\w+) and (\w+))?"
)


def read_caption(text: str) -> list[tuple[str, str, str, str]]:
    """(place or "", size, colour, shape) of every thing that one sentence names, in either manner."""
    found = CAPTIONED.findall(text[0].lower() + text[1:])
    return [(place, early or late, hue or late_hue, shape) for early, hue, shape, place, late, late_hue in found]


def test_no_scene_belongs_to_two_splits_in_any_file(small_world):
    seen = {split: {i.scene for i in world.read_split(small_world, split)} for split in ("train", "val", "test")}
    for record in json.loads((small_world / "text.json").read_text()):
        told, _, _ = record["conversations"][0]["value"].partition("\n")
        things = [Thing(PLACES.index(place), *name) for part in told.split(". ") for place, *name in read_caption(part)]
        assert things
        seen["train"].add(scenes.make_scene(things))
    assert all(scene.split == split for split, found in seen.items() for scene in found)
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]


def test_a_damaged_file_of_the_world_is_named(small_world, tmp_path):
    shutil.copytree(small_world / "annotations", tmp_path / "annotations")
    for name in ("captions_val.json", "instances_val.json"):
        file = tmp_path / "annotations" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:1000])
        with pytest.raises(Error, match=rf"{name}: cannot be read as JSON"):
            world.read_split(tmp_path, "val")
        file.write_bytes(whole)
    assert len(world.read_split(tmp_path, "val")) == len(world.read_split(small_world, "val"))


def test_worlds_that_cannot_be_asked_about_are_one_line(small_world, tmp_path, monkeypatch):
    """Too small for so many questions, of one scene alone, with annotations or records of something else."""
    monkeypatch.setattr(evaluation, "IN_VAIN", 1000)
    with pytest.raises(Error, match="the test scenes hold no 1000 questions about colour; draw more of them"):
        evaluation.make_items(small_world, 1000)
    shutil.copytree(small_world, tmp_path / "world", ignore=shutil.ignore_patterns("images"))
    told, boxed = (tmp_path / f"world/annotations/{name}_test.json" for name in ("captions", "instances"))
    content = json.loads(told.read_text())
    told.write_text(json.dumps(content | {"images": content["images"][:1]}))
    with pytest.raises(Error, match="the pictures of test all show the same"):
        evaluation.make_items(tmp_path / "world", 1)
    for damage in ({"categories": []}, {"annotations": [{}]}, {"annotations": None}):
        boxed.write_text(json.dumps(json.loads((small_world / "annotations" / boxed.name).read_text()) | damage))
        with pytest.raises(Error, match="the annotations of test are not those of a drawn world"):
            evaluation.make_items(tmp_path / "world", 1)
    (tmp_path / "world/instruct.json").write_text(json.dumps([{"id": "1", "conversations": []}]))
    with pytest.raises(Error, match=r"instruct.json: record number 0 has no kind, wordings and forms"):
        evaluation.guesses(tmp_path / "world", evaluation.make_items(small_world, 1))


def test_boxes_alone_give_back_the_scene_that_was_drawn():
    for seed, scene in enumerate(some_scenes(200)):
        _, boxes = draw(scene, seed)
        instances = [{"category": t.name, "bbox": box} for t, box in zip(scene.things, boxes, strict=True)]
        assert teacher.scene_from_boxes(instances, scenes.PIXELS) == scene


def test_every_thing_is_painted_in_its_colour_inside_its_box_in_the_middle_of_its_cell():
    for seed, scene in enumerate(some_scenes(60)):
        image, boxes = draw(scene, seed)
        for thing, (x, y, width, height) in zip(scene.things, boxes, strict=True):
            middle = np.array(image)[round(y + height / 2), round(x + width / 2)].astype(int)
            assert np.abs(middle - COLOURS[thing.colour]).max() < 12
            assert min(x, y) > -4 and max(x + width, y + height) < 100  # of 96 pixels: only tips are cut
            assert (int(3 * (x + width / 2) / 96), int(3 * (y + height / 2) / 96)) == (thing.column, thing.row)


def test_near_misses_differ_from_the_scene_and_keep_its_number_of_things():
    rng = random.Random(0)
    for scene in some_scenes(50):
        others = scenes.near_misses(scene, rng, 3)
        assert len({scene, *others}) == 4
        assert all(len(o.things) == len(scene.things) and o.split == scene.split for o in others)


def test_near_misses_are_refused_where_there_are_not_so_many():
    rng = random.Random(0)
    scene = scenes.random_scene(rng, "test", count=1)
    (thing,) = scene.things
    values = {"size": scenes.SIZES, "colour": list(COLOURS), "shape": scenes.SHAPES, "cell": range(9)}
    others = [replace(thing, **{what: value}) for what, known in values.items() for value in known]
    alike = {other for thing in others if (other := Scene((thing,))).split == "test"} - {scene}
    assert set(scenes.near_misses(scene, rng, len(alike))) == alike
    with pytest.raises(Error, match=f"has {len(alike)} near misses"):
        scenes.near_misses(scene, rng, len(alike) + 1)


def test_a_reference_fits_one_thing_only_and_hides_what_is_asked():
    things = SCENE.things
    assert "the heart" in language.references(SCENE, things[1], "colour")
    assert "the large star" in language.references(SCENE, things[0], "colour")
    assert "the star" not in language.references(SCENE, things[0], "colour")
    assert "the blue object" in language.references(SCENE, things[2], "shape")
    for thing in things:
        for hidden, word in (("colour", thing.colour), ("shape", thing.shape), ("size", thing.size)):
            assert all(word not in phrase.split() for phrase in language.references(SCENE, thing, hidden))


def test_a_thing_whose_shape_is_enough_is_mostly_called_by_it():
    rng = random.Random(4)
    counts = Counter(language.refer(SCENE, SCENE.things[1], "size", rng) for _ in range(1000))
    assert counts.keys() == set(language.references(SCENE, SCENE.things[1], "size"))
    assert counts["the heart"] > 500


def test_things_that_look_alike_are_told_apart_and_places_that_mislead_are_not_used():
    twins = Scene((Thing(0, "large", "red", "star"), Thing(1, "small", "red", "star")))
    assert language.names(twins, twins.things) == ["large red star", "small red star"]
    assert language.names(twins, twins.things[1:], "size") == ["small star"]
    assert language.names(SCENE, SCENE.things[:2]) == ["red star", "red heart"]
    assert "the object at the top" not in language.references(twins, twins.things[1], "colour")
    assert "the object at the top left" in language.references(twins, twins.things[0], "colour")
    assert "the object at the bottom" in language.references(SCENE, SCENE.things[2], "colour")


def matching(scene: Scene, words: list[str]) -> list[Thing]:
    """The things that fit every word of a noun phrase, read word by word: not how the phrases were made."""
    singular = [
        w.removesuffix("es") if w == "crosses" else w.removesuffix("s") if w[:-1] in SHAPES else w for w in words
    ]
    return [
        t for t in scene.things if all(w not in (*SIZES, *COLOURS, *SHAPES) or w in t.name.split() for w in singular)
    ]


def test_answers_on_one_scene_are_those_that_a_person_would_give():
    rng, asked = random.Random(1), defaultdict(set)
    for kind in (*KINDS, "look"):
        for _ in range(2000):
            question = language.ask(SCENE, kind, rng)
            asked[kind].add((question.text, question.answer))
    expected = {
        ("What colour is the heart?", "The heart is red."),
        ("What shape is the blue object?", "The blue object is a star."),
        ("Is the blue star large or small?", "The blue star is small."),
        ("How many stars are there?", "Looking for stars, I see a red star and a blue star, so two."),
        (
            "How many objects are there?",
            "Looking for objects, I see a red star, a red heart and a blue star, so three.",
        ),
        ("How many crosses can you see in the picture?", "Looking for crosses, I see none."),
        ("Is there a blue heart?", "Looking for hearts, I see a red heart. Blue? No."),
        ("Is there a red heart?", "Looking for hearts, I see a red heart. Red? Yes."),
        ("Is there a blue star in the picture?", "Looking for stars, I see a red star and a blue star. Blue? Yes."),
        ("Is there a large circle?", "Looking for circles, I see none, so no."),
        ("Is there a large star?", "Looking for stars, I see a large star and a small star. Large? Yes."),
        ("Can you see a heart?", "Looking for hearts, I see a red heart, so yes."),
        ("Can you see a cross?", "Looking for crosses, I see none, so no."),
        ("Where is the heart?", "The heart is small, red and at the top right."),
        ("Where in the picture is the blue object?", "The blue object is a small star at the bottom."),
        ("Tell me about the heart.", "The heart is small, red and at the top right."),
        ("What does the blue object look like?", "The blue object is a small star at the bottom."),
        ("Describe the object at the bottom.", "The object at the bottom is a small blue star."),
        (
            "Is the heart to the left or to the right of the blue star?",
            "The heart is small, red and at the top right; the blue star is small and at the bottom; "
            "so the heart is to the right.",
        ),
        (
            "Is the blue star above the heart?",
            "The blue star is small and at the bottom; the heart is small, red and at the top right; "
            "so the blue star is below. Above? No.",
        ),
        (
            "What shape is the object to the right of the blue star?",
            "The blue star is small and at the bottom; to the right of it is the red object, which is a heart.",
        ),
        (
            "Is the object below the heart large or small?",
            "The heart is small, red and at the top right; below it is the blue star, which is small.",
        ),
        (
            "How many objects would be left without the stars?",
            "Without the stars, the red heart would be left, so one.",
        ),
        (
            "If the hearts were taken away, how many objects would be left?",
            "Without the hearts, the red star and the blue star would be left, so two.",
        ),
        (
            "How many objects would be left without the small objects?",
            "Without the small objects, the red star would be left, so one.",
        ),
    }
    assert expected <= set().union(*asked.values())


def last_word(answer: str) -> str:
    """What an answer comes down to."""
    return answer.rstrip(".").split()[-1].lower()


@pytest.mark.parametrize("kind", ["count", "remaining"])
def test_counts_agree_with_counting(kind):
    rng = random.Random(2)
    for scene in some_scenes(300):
        question = language.ask(scene, kind, rng)
        named = matching(scene, question.text.rstrip("?.").replace(",", "").split())
        kept = named if kind == "count" else [t for t in scene.things if t not in named]
        assert NUMBERS.index(last_word(question.answer)) == len(kept)
        listed = question.answer.split(", ", 1)[1]  # behind what is counted or taken away
        assert [(t.colour, t.shape) for t in kept] == re.findall(NAMED, listed)


NAMED = rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"


def test_existence_agrees_with_looking():
    rng = random.Random(3)
    for scene in some_scenes(300):
        question = language.ask(scene, "existence", rng)
        found = matching(scene, question.text.rstrip("?").split())
        assert last_word(question.answer) == ("yes" if found else "no")
        shape = next(shape for shape in SHAPES if shape in question.text)
        named = [word for word in re.findall(r"\w+", question.answer)[3:] if word in SHAPES]
        assert named == [t.shape for t in scene.things if t.shape == shape]


def test_a_look_tells_what_the_question_does_not():
    rng = random.Random(12)
    for scene in some_scenes(300):
        question = language.ask(scene, "look", rng)
        words = re.findall(r"\w+", question.answer)
        (told,) = {t for t in scene.things if all(word in words for word in t.name.split())}
        assert question.answer.endswith(f" {PLACES[told.cell]}.") or f" {PLACES[told.cell]} is " in question.answer
        assert sum(word in (*SIZES, *COLOURS, *SHAPES) for word in words) == 3


def test_relations_agree_with_rows_and_columns():
    rng = random.Random(8)
    steps = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for scene in some_scenes(300):
        if not (question := language.ask(scene, "relation", rng)):
            continue
        a, b = (only(scene, question.parts[name]) for name in ("a", "b"))
        assert question.answer.count(PLACES[a.cell]) and question.answer.count(PLACES[b.cell])
        asked = re.findall("left|right|above|below", question.text)
        (found,) = re.findall(r"; so .* is (?:to the )?(left|right|above|below)\.", question.answer)
        down, across = steps[found]
        assert (a.row - b.row) * down + (a.column - b.column) * across > 0
        if len(asked) == 1:
            assert last_word(question.answer) == ("yes" if asked == [found] else "no")
        else:
            assert found in asked


def only(scene: Scene, phrase: str) -> Thing:
    """The one thing that a phrase without a place names."""
    (thing,) = matching(scene, phrase.split())
    return thing


FAIR = {"size": 0.5, "existence": 0.5, "relation": 0.5, "colour": 1 / 8, "shape": 1 / 6, "place": 1 / 9}


@pytest.mark.parametrize("kind", FAIR)
def test_the_most_frequent_verdict_of_a_wording_is_hardly_more_frequent_than_the_others(kind):
    rng, verdicts = random.Random(4), defaultdict(Counter)
    for scene in some_scenes(9000):
        if question := language.ask(scene, kind, rng):
            place = re.search(rf"({LONGEST_FIRST})\.$", question.answer)
            verdicts[question.wording][place[1] if kind == "place" else last_word(question.answer)] += 1
    for counts in verdicts.values():
        assert max(counts.values()) / counts.total() < FAIR[kind] + 0.07  # 3 standard deviations of 500 draws at 1/2


def test_a_description_read_back_is_the_scene():
    rng = random.Random(5)
    for scene in some_scenes(200):
        assert evaluation.parse_description(language.describe(scene, rng).answer) == list(scene.things)
        names = evaluation.parse_names(language.describe(scene, rng).answer)
        assert names == [(t.size, t.colour, t.shape) for t in scene.things]


def test_a_caption_read_back_is_the_scene():
    rng, sorts = random.Random(13), Counter()
    for scene in some_scenes(200):
        for text in language.captions(scene, rng):
            told, placed = read_caption(text), " at " in text or " on " in text or " in " in text
            assert sorted(told) == sorted((PLACES[t.cell] * placed, t.size, t.colour, t.shape) for t in scene.things)
            assert evaluation.attributes(text) == Counter(word for t in scene.things for word in t.name.split())
            sorts["that is" in text, placed] += 1
    assert len(sorts) == 4 and min(sorts.values()) > 100  # the shape first or last, with places and without


def test_a_wrong_description_is_not_read_as_the_scene():
    text = language.describe(SCENE, random.Random(0)).answer
    assert evaluation.parse_description(text.replace("blue star", "green star")) != list(SCENE.things)
    assert evaluation.parse_description(text + " There is a small pink cross in the centre.") != list(SCENE.things)
    assert evaluation.parse_description(text.replace(PLACES[7], PLACES[8])) != list(SCENE.things)


def test_ctrl_c_in_an_evaluation_is_no_traceback(monkeypatch, capsys):
    def interrupted(folder: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "load", interrupted)
    assert evaluation.main(["model", "--world", "world"]) == 130
    assert capsys.readouterr().err == "\n"


def test_records_are_official_and_in_the_paper_s_proportions(small_world):
    records = json.loads((small_world / "instruct.json").read_text())
    kinds = Counter(record["kind"] for record in records)
    for kind, share in teacher.PROPORTIONS.items():
        assert abs(kinds[kind] / len(records) - share / 158) < 0.06  # 3 standard deviations of 640 draws
    for record in records:
        messages = messages_from_record(record)
        assert messages[0]["content"].count("<image>") == 1
        assert len(record["wordings"]) == len(record["forms"]) == len(messages) / 2
        assert (small_world / "images" / record["image"]).is_file()


def test_instructions_are_true_of_the_boxes_not_of_pixels(small_world):
    """The teacher sees captions and boxes: with a box moved in the annotations its records follow the annotations."""
    image = world.read_split(small_world, "train")[0]
    moved = replace(image, scene=SCENE)
    told = " ".join(t["value"] for r in world.instructions(40, moved) for t in r["conversations"])
    assert "heart" in told and "large red star at the top left" in told


def test_a_world_is_the_same_every_time(small_world, tmp_path):
    world.build(tmp_path, world.WorldSize(train=80, val=12, test=24, text=30, records=8))
    files = sorted(p.relative_to(small_world) for p in small_world.rglob("*") if p.is_file())
    assert len(files) == 80 + 12 + 24 + 6 + 4
    assert all((tmp_path / f).read_bytes() == (small_world / f).read_bytes() for f in files)


def test_the_contrastive_loss_by_hand():
    """Two images and two captions; cosines by a second formula, both directions of the cross-entropy written out."""
    torch.manual_seed(0)
    clip = pretrain.Clip(pretrain.VISION, vocab_size=50)
    pixels, captions = torch.randn(2, 3, 48, 48), [[3, 4, 5], [6, 7]]
    with torch.no_grad():
        a, b = clip.visual_projection(clip.vision.pooled(pixels))
        c, d = (clip.text_projection(clip.text([caption])[0]) for caption in captions)
        s = [[10 * (x @ y / (x.norm() * y.norm())).item() for y in (c, d)] for x in (a, b)]
        rows = [math.log(math.exp(s[i][0]) + math.exp(s[i][1])) - s[i][i] for i in (0, 1)]
        columns = [math.log(math.exp(s[0][i]) + math.exp(s[1][i])) - s[i][i] for i in (0, 1)]
        assert clip.loss(pixels, captions).item() == pytest.approx(sum(rows + columns) / 4, rel=1e-4)


def test_a_batch_of_contrastive_training_is_whole_families_and_single_things_come_first(small_world):
    images, steps = world.read_split(small_world, "train"), 8
    for step, numbers in enumerate(pretrain.draw_families(images, steps, families=3)):
        families = [numbers[i : i + world.FAMILY] for i in range(0, len(numbers), world.FAMILY)]
        assert all(f[0] % world.FAMILY == 0 and f == list(range(f[0], f[0] + world.FAMILY)) for f in families)
        if step < pretrain.SHARE_OF_SINGLE_THINGS * steps:
            assert all(len(images[n].scene.things) == 1 for n in numbers)
    assert step == steps - 1


def test_of_a_summary_only_the_summary_is_learnt(tiny_tokenizer_file):
    tokenizer = Tokenizer(tiny_tokenizer_file)
    turns = [{"from": "human", "value": "A red star."}, {"from": "gpt", "value": "A star."}]
    config = LlavaConfig(pretrain.VISION, LlamaConfig(400), max_length=256)
    example = pretrain.make_text({"id": "1", "kind": "summary", "conversations": turns}, tokenizer, config)
    learnt = example.labels != IGNORE
    assert tokenizer.decode(example.token_ids[learnt]) == "A star.\n"
    assert tokenizer.decode(example.token_ids[~learnt]) == "A red star." and not example.images
    assert (example.labels[learnt] == example.token_ids[learnt]).all()


def test_at_the_start_of_clip_a_patch_holds_nothing_of_its_neighbours():
    torch.manual_seed(0)
    tower = pretrain.Clip(pretrain.VISION, vocab_size=50).vision
    pixels = torch.randn(1, 3, 48, 48)
    other = pixels.clone()
    other[:, :, :16, :16] = 0  # the first patch
    with torch.no_grad():
        same = (tower(pixels) == tower(other)).all(-1)[0]
    assert same.tolist() == [False] + 8 * [True]


def test_at_the_start_every_layer_of_the_decoder_sees_the_words_themselves():
    language_model = Llama(LlamaConfig(400, 64, 160, 3, 2))
    pretrain.initialise(language_model)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        words = language_model.embed_tokens(ids)
        assert torch.equal(language_model.hidden(words), language_model.norm(words))
    assert language_model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.05)
    matrix = language_model.layers[2].mlp.up_proj.weight
    assert matrix.norm().item() ** 2 == pytest.approx(len(matrix), rel=0.1)  # a row of norm 1 keeps sizes
