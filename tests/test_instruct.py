"""From captions and boxes to records: contexts, prompts, the plan, replies, the run, and the teachers without a
network. What goes over the network is in oracle/test_instruct_endpoint.py."""

import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanollava import checkpoint
from nanollava.error import Error
from nanollava.evaluate.miniature import parse_description
from nanollava.instruct import __main__ as command
from nanollava.instruct import brief, messages
from nanollava.instruct.contexts import Context, name_of, read_coco, read_lines
from nanollava.instruct.local import LocalTeacher
from nanollava.instruct.messages import FOLDER, KINDS, estimate, read_prompts
from nanollava.instruct.plan import make_plan, most_records, shares
from nanollava.instruct.replies import Unusable, turns_of
from nanollava.instruct.rules import RuleTeacher
from nanollava.instruct.teacher import Reply, Request, Unanswered
from nanollava.llava import LlavaConfig
from nanollava.miniature import language, world
from nanollava.miniature.scenes import Scene, Thing, random_scene
from nanollava.tokenizer import Tokenizer
from nanollava.train.keep import alone
from nanollava.train.records import read_records

SCENE = Scene((Thing(0, "large", "red", "star"), Thing(5, "small", "blue", "heart")))


def run(*words: object) -> int:
    """The exit status of ``python -m nanollava.instruct WORDS``."""
    return command.main([str(word) for word in words])


def refused(capsys, *words: object) -> str:
    """What a run says that ends with status 2: one line."""
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A small world: 30 pictures, their captions and boxes."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(3)
    (folder / "annotations").mkdir()
    world.write_split(folder, "train", [SCENE] + [random_scene(rng, "train") for _ in range(29)], 1, rng)
    return folder


# ---------------------------------------------------------------- contexts

COCO = {
    "images": [
        {"id": 42, "file_name": "kites.jpg", "width": 640, "height": 480},
        {"id": 7, "file_name": "cat.jpg", "width": 100, "height": 200},
    ],
    "annotations": [
        {"id": 1, "image_id": 42, "caption": "Two kites."},
        {"id": 2, "image_id": 7, "caption": "A cat.\n"},
        {"id": 3, "image_id": 42, "caption": "A man on\na beach."},
    ],
}
BOXES = {
    "images": COCO["images"],
    "categories": [{"id": 3, "name": "kite"}, {"id": 9, "name": "person"}],
    "annotations": [
        {"id": 1, "image_id": 42, "category_id": 9, "bbox": [435.84, 116.16, 59.52, 216.96]},
        {"id": 2, "image_id": 42, "category_id": 3, "bbox": [0, 48, 217.6, 432]},
    ],
}
CAPTIONS = "Two kites.\nA man on a beach."


def coco(folder: Path, told: object = COCO, boxed: object = BOXES) -> tuple[Path, Path]:
    files = folder / "captions.json", folder / "instances.json"
    for file, content in zip(files, (told, boxed), strict=True):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return files


def test_coco_files_become_the_text_that_the_protocol_gives(tmp_path):
    """(x, y, x + w, y + h) over (640, 480): 435.84 / 640 = 0.681, 116.16 / 480 = 0.242, 495.36 / 640 = 0.774, ..."""
    kites, cat = read_coco(*coco(tmp_path))
    assert (kites.id, kites.image, cat.id) == ("000000000042", "kites.jpg", "000000000007")
    assert kites.text(boxes=False) == CAPTIONS
    assert kites.text(boxes=True) == f"{CAPTIONS}\n\nperson: [0.681, 0.242, 0.774, 0.694]\nkite: [0.0, 0.1, 0.34, 1.0]"
    assert cat.text(boxes=True) == "A cat."


def test_all_contexts_of_the_benchmark_come_out_as_written(fixtures):
    file = fixtures / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is missing: it is public in haotian-liu/LLaVA")
    contexts = read_lines(file)
    assert len(contexts) == 80
    for line, context in zip(file.read_text().splitlines(), contexts, strict=True):
        written = json.loads(line)
        boxes = re.findall(r'"category": "([^"]+)", "bbox": (\[[^\]]+\])', line)  # the numbers as the file prints them
        told = "\n".join(written["captions"])
        assert (context.id, context.text(False)) == (written["id"], told)
        assert context.text(True) == (told + "\n\n" + "\n".join(map(": ".join, boxes)) if boxes else told)


def test_both_formats_tell_the_same_of_an_image(fixtures, tmp_path):
    """Boxes of the benchmark, turned into pixels of an image of 1000 x 1000, come back."""
    lines = read_lines(fixtures / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl")
    names = sorted({i["category"] for context in lines for i in context.instances})
    images = [{"id": int(c.id), "file_name": c.image, "width": 1000, "height": 1000} for c in lines]
    told = [{"image_id": int(c.id), "caption": text} for c in lines for text in c.captions]
    boxed = []
    for context in lines:
        for instance in context.instances:
            x1, y1, x2, y2 = (1000 * value for value in instance["bbox"])
            box = {"category_id": names.index(instance["category"]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            boxed.append({"image_id": int(context.id), **box})
    kinds = [{"id": i, "name": name} for i, name in enumerate(names)]
    files = coco(tmp_path, {"images": images, "annotations": told}, {"images": images, "annotations": boxed, "categories": kinds})  # fmt: skip # noqa: E501
    assert read_coco(*files) == lines


def changed(content: dict, path: str, value: object) -> dict:
    """A copy in which the entry at a path such as "images/0/id" has another value; None removes it."""
    content = json.loads(json.dumps(content))
    *parents, last = [int(word) if word.isdigit() else word for word in path.split("/")]
    place = content
    for word in parents:
        place = place[word]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("images", None, ["captions.json: images: missing"]),
        ("images", [], ["captions.json: images: the list is empty"]),
        ("images/0/id", "a", ["captions.json: images: an entry with id 'a'"]),
        ("images/1/id", 42, ["captions.json: images: id 42 is there twice"]),
        ("images/0/file_name", None, ["captions.json: image 42: file_name: missing"]),
        ("annotations/0/image_id", 8, ["captions.json: annotation 1: image_id 8 is none of its images"]),
        ("annotations/1/caption", "  ", ["captions.json: annotation 2: caption: missing, empty"]),
        ("annotations/1/caption", "An <image>.", ["captions.json: annotation 2: caption: holds <image>"]),
        ("annotations/1/caption", "\ud800", ["captions.json: annotation 2: caption: holds half of a character"]),
        ("annotations/1", None, ["captions.json: no captions for 1 (7) of its images"]),
        ("annotations", [1], ["captions.json: annotations: missing, or not a list of objects"]),
    ],
)
def test_a_captions_file_that_is_wrong_is_told_by_file_and_entry(path, value, words, tmp_path, capsys):
    told, boxed = coco(tmp_path, changed(COCO, path, value))
    line = refused(capsys, "--captions", told, "--instances", boxed, "--out", tmp_path / "out")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("images/0", None, ["instances.json: images of", "captions.json are not in it: 1 (42)"]),
        ("images/0/width", None, ["instances.json: image 42: width and height are missing"]),
        ("annotations/0/image_id", 8, ["instances.json: annotation 1: image_id 8 is none of its images"]),
        ("annotations/1/category_id", 4, ["instances.json: annotation 2: category_id 4 is none of its categories"]),
        ("annotations/1/category_id", [3], ["instances.json: annotation 2: category_id [3] is none of its categories"]),
        ("annotations/1/bbox", [1, 2, 3], ["instances.json: annotation 2: bbox: give four numbers"]),
        ("annotations/1/bbox", [10**400, 2, 3, 4], ["instances.json: annotation 2: bbox: give four numbers"]),
        ("images/0/width", 10**400, ["instances.json: image 42: width and height are missing, or no sizes"]),
        ("annotations/1/bbox", [1, 2, 3, float("nan")], ["instances.json: annotation 2: bbox: give four numbers"]),
        ("annotations/1/bbox", [600, 2, 300, 4], ["instances.json: annotation 2: bbox", "not inside of its image"]),
        ("categories/0/name", "", ["instances.json: category 3: name: missing, empty"]),
    ],
)
def test_an_instances_file_that_is_wrong_is_told_by_file_and_entry(path, value, words, tmp_path, capsys):
    content = changed(BOXES, path, value)
    if path == "images/0":  # a file of another split, otherwise in order
        content["annotations"] = []
    told, boxed = coco(tmp_path, COCO, content)
    line = refused(capsys, "--captions", told, "--instances", boxed, "--out", tmp_path / "out")
    assert all(word in line for word in words), line


LINE = {"id": "42", "image": "a.jpg", "captions": ["A cat."], "instances": [{"category": "cat", "bbox": [0, 0, 1, 1]}]}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", ": no line in it"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE)[:-9], ", line 2: is not whole JSON"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE), ", line 2: id 000000000042 is there a second time"),
        ("[]", ", line 1: holds a list"),
        (json.dumps(changed(LINE, "id", None)), ", line 1: id: missing"),
        (json.dumps(changed(LINE, "image", None)), ", line 1: image: missing"),
        (json.dumps(changed(LINE, "captions", [])), ", line 1: captions: missing"),
        (json.dumps(changed(LINE, "captions/0", 3)), ", line 1: captions[0]: missing, empty, or not text"),
        (json.dumps(changed(LINE, "instances", {})), ", line 1: instances: must be a list"),
        (json.dumps(changed(LINE, "instances/0/category", None)), ", line 1: instances[0].category: missing"),
        (json.dumps(changed(LINE, "instances/0/bbox", None)), ", line 1: instances[0]: bbox: give four numbers"),
        (
            json.dumps(changed(LINE, "instances/0/bbox", [0, 0, 640, 480])),
            ", line 1: instances[0]: bbox [0, 0, 640, 480] is not inside of its image",
        ),
    ],
)
def test_json_lines_that_are_wrong_are_told_by_line(lines, words, tmp_path, capsys):
    file = tmp_path / "contexts.jsonl"
    file.write_text(lines)
    assert f"{file}{words}" in refused(capsys, "--contexts", file, "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give one of --captions"),
        (["--world", "{}", "--contexts", "x"], "give one of --captions"),
        (["--captions", "{}/captions.json"], "--captions: give --instances too"),
        (["--world", "{}", "--instances", "x"], "--instances goes with --captions"),
        (["--world", "{}"], "{}/annotations: no such folder"),
        (["--captions", "{}/captions.json", "--instances", "{}/none.json"], "{}/none.json: no such file; give COCO's"),
        (["--captions", "{}/half.json", "--instances", "{}/instances.json"], "{}/half.json: cannot be read as JSON"),
        (["--contexts", "{}/none.jsonl"], "{}/none.jsonl: cannot be read"),
        (
            ["--captions", "{}/captions.json", "--instances", "{}/instances.json", "--kinds", "detail,x"],
            "--kinds x: no",
        ),
        (
            ["--captions", "{}/captions.json", "--instances", "{}/instances.json", "--records", 6],
            "--records 6: give 1 to 5",
        ),
        (["--captions", "{}/captions.json", "--instances", "{}/instances.json", "--records", 0], "--records 0: give 1"),
        (
            ["--captions", "{}/captions.json", "--instances", "{}/instances.json", "--teacher", "{}/no"],
            "no such folder",
        ),
        (["--world", "{}", "--teacher", "endpoint", "--concurrency", 0], "--concurrency 0: give 1 or more"),
        (["--world", "{}", "--timeout", 0], "--timeout 0.0: give more than 0"),
        (["--world", "{}", "--timeout", "inf"], "--timeout inf: give more than 0 seconds, at most 86,400"),
        (["--world", "{}", "--retry-pause", 1e9], "--retry-pause 1000000000.0: give 0 or more, at most 86,400"),
        (["--world", "{}", "--temperature", "nan"], "--temperature nan: give 0 or more"),
        (["--world", "{}", "--temperature", "inf"], "--temperature inf: give 0 or more, at most 100"),
        (
            [
                "--captions",
                "{}/captions.json",
                "--instances",
                "{}/instances.json",
                "--teacher",
                "endpoint",
                "--teacher-model",
                "a\nb",
            ],
            "name its model too, on one line",
        ),
        (["--captions", "{}/captions.json", "--instances", "{}/instances.json", "--teacher", "endpoint"], "its model"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(words, told, tmp_path, capsys):
    coco(tmp_path)
    (tmp_path / "half.json").write_text(json.dumps(COCO)[:-20])
    line = refused(capsys, "--out", tmp_path / "out", *(str(word).format(tmp_path) for word in words))
    assert told.format(tmp_path) in line


# ---------------------------------------------------------------- prompts


def test_the_prompts_are_complete_and_keep_their_own_rules():
    prompts = read_prompts(FOLDER)
    assert [sum(m["role"] == "user" for m in prompts.beginnings[kind]) for kind in KINDS] == [2, 3, 3]
    assert (len(set(prompts.brief)), len(set(prompts.detail))) == (11, 16)
    box = re.compile(r"[a-z ]+: \[(0\.\d{1,3}|1\.0)(, (0\.\d{1,3}|1\.0)){3}\]")
    for kind in KINDS:
        system, *examples = prompts.beginnings[kind]
        assert ("x1, y1, x2, y2" in system["content"]) == (kind != "conversation")
        for given, reply in zip(examples[::2], examples[1::2], strict=True):
            told, _, boxes = given["content"].partition("\n\n")
            assert len(told.split("\n")) == 5 and (given["role"], reply["role"]) == ("user", "assistant")
            assert bool(boxes) == (kind != "conversation")
            assert all(box.fullmatch(line) for line in boxes.split("\n") if boxes)
            for line in boxes.split("\n") if boxes else ():
                x1, y1, x2, y2 = json.loads(line.partition(": ")[2])
                assert x1 < x2 and y1 < y2
            assert turns_of(kind, reply["content"])  # and so says nothing of captions and boxes


def test_messages_are_system_examples_and_the_image_in_words(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "mine")
    (tmp_path / "mine/detail/system_message.txt").write_text("Be short.\n")
    for name in ("001", "002"):
        for end in ("caps", "conv"):
            (tmp_path / f"mine/detail/{name}_{end}.txt").unlink()
    (tmp_path / "mine/detail/000_caps.txt").write_text("A cup.\n\ncup: [0.1, 0.2, 0.3, 0.4]\n")
    (tmp_path / "mine/detail/000_conv.txt").write_text("There is a cup.\n")
    context = Context("1", "a.jpg", ["A cat.", "Cats."], [{"category": "cat", "bbox": [0.0, 0.5, 0.25, 1.0]}])
    prompts = read_prompts(tmp_path / "mine")
    assert prompts.messages("detail", context) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "A cup.\n\ncup: [0.1, 0.2, 0.3, 0.4]"},
        {"role": "assistant", "content": "There is a cup."},
        {"role": "user", "content": "A cat.\nCats.\n\ncat: [0.0, 0.5, 0.25, 1.0]"},
    ]
    assert prompts.messages("conversation", context)[-1]["content"] == "A cat.\nCats."
    assert prompts.checksum != read_prompts(FOLDER).checksum


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("detail/system_message.txt", None, "detail/system_message.txt: cannot be read (No such file"),
        ("reasoning/001_conv.txt", None, "reasoning/001_conv.txt: cannot be read (No such file"),
        ("reasoning/001_caps.txt", "\n", "reasoning/001_caps.txt: is empty"),
        ("conversation/000_conv.txt", "Question:\nWhat?\n", "its last question has no answer; such a reply would be"),
        ("brief.txt", "What?\nWhat is in <image>?\n", "brief.txt: 'What is in <image>?' holds <image>"),
        ("detail.txt", "", "detail.txt: is empty"),
        ("", None, "no such folder of prompts; copy"),
    ],
)
def test_a_damaged_folder_of_prompts_is_one_line(file, text, words, drawn, tmp_path, capsys):
    folder = tmp_path / "prompts"
    if file:
        shutil.copytree(FOLDER, folder)
        (folder / file).unlink() if text is None else (folder / file).write_text(text)
    assert words in refused(capsys, "--world", drawn, "--prompts", folder, "--out", tmp_path / "out")


def test_tokens_are_estimated_as_the_rule_says():
    assert estimate("A cat, 2 dogs.") == 6  # A | cat | , | 2 | dogs | .
    assert estimate("person: [0.681, 0.242]") == 11  # person : [ 0 . 681 , 0 . 242 ]
    assert estimate("one\n\ntwo") == 3 and estimate("12345") == 2


# ---------------------------------------------------------------- the plan


def test_kinds_are_shared_out_by_largest_remainder():
    """Of 10: 3.67, 1.46 and 4.87; whole parts 3, 1 and 4; the two left go to .87 and .67."""
    kinds = list(KINDS)
    assert shares(158, kinds) == {"conversation": 58, "detail": 23, "reasoning": 77}
    assert shares(10, kinds) == {"conversation": 4, "detail": 1, "reasoning": 5}
    assert shares(1, kinds) == {"conversation": 0, "detail": 0, "reasoning": 1}
    assert shares(10, ["conversation", "detail"]) == {"conversation": 7, "detail": 3}


@pytest.mark.parametrize("kinds", [list(KINDS), ["conversation", "detail"], ["detail"]])
@pytest.mark.parametrize("images", [1, 2, 7, 80])
def test_the_plan_gives_no_image_a_kind_twice_and_leaves_none_out(images, kinds):
    contexts = [Context(f"{i:012d}", f"{i}.jpg", ["A cat."]) for i in range(images)]
    possible, smaller = [n for n in range(1, 4 * images) if max(shares(n, kinds).values()) <= images], set()
    assert most_records(images, kinds) == max(possible)
    assert len(make_plan(contexts, kinds, None, 0)) == max(possible)
    for records in possible:
        plan = make_plan(contexts, kinds, records, 5)
        assert len({item.key for item in plan}) == len({(i.kind, i.context.id) for i in plan}) == records
        assert Counter(item.kind for item in plan) == +Counter(shares(records, kinds))
        each = Counter(item.context.id for item in plan)
        assert len(each) == min(records, images)
        if records not in (59, 100):  # where a remainder jumps, one kind has fewer than among 58 and 99
            assert smaller <= {item.key for item in plan}
        smaller = {item.key for item in plan}
    assert make_plan(contexts, kinds, None, 5) == make_plan(contexts, kinds, None, 5)
    if images > 2:
        assert make_plan(contexts, kinds, None, 5) != make_plan(contexts, kinds, None, 6)


# ---------------------------------------------------------------- replies

GOOD = "Question:\nHow many?\n===\nAnswer:\nTwo.\n\nBoth red.\n===\nQuestion:\nWhere?\n===\nAnswer:\nHere."
TURNS = [("How many?", "Two.\n\nBoth red."), ("Where?", "Here.")]


def test_replies_become_turns():
    assert turns_of("conversation", GOOD) == TURNS
    assert turns_of("conversation", f"===\n{GOOD}\n\n=====\n".replace("\n===\n", "\r\n ===  \r\n\r\n")) == TURNS
    assert turns_of("conversation", GOOD.replace(":\n", ": ").replace("Q", "q")) == TURNS
    assert turns_of("reasoning", GOOD[:47]) == [("How many?", "Two.\n\nBoth red.")]
    assert turns_of("detail", " A cat. \n\nAnd a dog.\n", question="What?") == [("What?", "A cat. \n\nAnd a dog.")]
    assert turns_of("conversation", GOOD.replace("Two", "The answer is = or === two")) != TURNS  # within a line


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("conversation", "", "it is empty"),
        ("detail", " \n", "it is empty"),
        ("conversation", "Two kites are visible.", "no Question: where one is due"),
        ("conversation", f"Sure!\n{GOOD}", "no Question: where one is due"),
        ("conversation", "===", "no Question: where one is due"),
        ("conversation", GOOD.partition("===\n")[2], "Answer: where Question: is due"),
        ("conversation", GOOD.replace("Where?", ""), "an empty question"),
        ("conversation", GOOD.replace("Here.", ""), "an empty answer"),
        ("conversation", GOOD.replace("===", "---"), "wrong separators"),
        ("conversation", GOOD.replace("\n===\n", "\n\n"), "wrong separators"),
        ("conversation", GOOD.rpartition("\n===")[0], "its last question has no answer"),
        ("conversation", GOOD.replace("Here", "In <image>"), "it holds <image>"),
        ("detail", "A cat.</s>", "it holds </s>"),
        ("detail", "A \ud800.", "half of a character"),
        ("detail", GOOD, "a description alone was asked for"),
        ("detail", "Its bounding box is large.", "speaks of its sources: 'bounding box'"),
        ("detail", "As the captions say, a cat.", "speaks of its sources: 'the captions say'"),
        ("detail", "A cat at [0.1, 0.2, 0.3, 0.4].", "speaks of its sources: '[0.1'"),
        ("reasoning", GOOD, "it has 2 questions where one was asked for"),
    ],
)
def test_replies_that_are_no_records_say_why(kind, text, reason):
    with pytest.raises(Unusable, match=re.escape(reason)):
        turns_of(kind, text)


@pytest.mark.parametrize(
    "words",
    [
        "its bounding boxes overlap",
        "the coordinates place the cat on the left",
        "the cat is at coordinates (0.1, 0.2)",
        "coordinates of the dog lie further right",
        "with coordinates near the edge, the cup may fall",
        "the given captions name a cat",
        "in the provided descriptions there is a dog",
        "the caption mentions a cat",
        "The sentences do not tell the colour",
        "these descriptions all suggest a party",
        "according to the captions it rains",
        "as described in the sentences, it rains",
        "based on the caption, it rains",
    ],
)
def test_talk_of_captions_and_boxes_is_found(words):
    with pytest.raises(Unusable, match="speaks of its sources"):
        turns_of("detail", f"A street. {words}.")


@pytest.mark.parametrize(
    "words",
    [
        "He coordinates the traffic",
        "Two people coordinate their steps, and their clothes are coordinated",
        "The officer coordinates with a colleague",
        "On the sign the captions are in French",
        "The captions below the photographs in the museum are small",
        "Under the drawing the caption reads Stop",
        "A teacher points at the sentences on the blackboard",
        "She compares the descriptions of two dishes on the menu",
        "A box stands at the edge of the field, bound with string",
    ],
)
def test_what_a_picture_may_show_is_no_talk_of_sources(words):
    assert turns_of("detail", f"A street. {words}.", question="What?") == [("What?", f"A street. {words}.")]


def test_a_reply_that_was_cut_off_is_none_however_good_it_looks():
    with pytest.raises(Unusable, match="cut off: ask again with more --max-tokens"):
        turns_of("conversation", GOOD, cut=True)


# ---------------------------------------------------------------- the teacher of the miniature world


def right_answers(scene: Scene) -> set[tuple[str, str]]:
    """All questions about a scene with their answers, but for a few rare ones."""
    rng = random.Random(0)
    asked = [language.ask(scene, kind, rng) for kind in language.CANDIDATES for _ in range(400)]
    return {(question.text, question.answer) for question in asked if question}


def test_the_whole_pipeline_without_network_or_key(drawn, tiny_tokenizer_file, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert run("--world", drawn, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    records = json.loads((tmp_path / "out/instruct.json").read_text())
    kinds = Counter(record["kind"] for record in records)
    assert kinds == {"conversation": 23, "detail": 9, "reasoning": 30}  # 62 x 58 / 158 = 22.8, 9.0, 30.2
    assert "62 records about 30 images" in told and (tmp_path / "out/rejected.jsonl").read_text() == ""
    mean = sum(len(r["conversations"]) for r in records if r["kind"] == "conversation") / 2 / 23
    assert re.search(rf"conversation +23 +23 +0 +{mean:.2f}\n", told)
    scenes = {f"{image.id:012d}": image.scene for image in world.read_split(drawn, "train")}
    prompts, marks = read_prompts(FOLDER), Counter()
    for record in records:
        turns = [turn["value"] for turn in record["conversations"]]
        marks[turns[0].startswith("<image>\n")] += 1
        first = turns[0].removeprefix("<image>\n").removesuffix("\n<image>")
        assert len(first) == len(turns[0]) - len("<image>\n")
        if record["kind"] == "detail":
            assert first in prompts.detail and parse_description(turns[1]) == list(scenes[record["id"]].things)
    assert 15 < marks[True] < 47  # a fair coin leaves this range once in 30,000
    config = LlavaConfig()
    examples, report = read_records(
        tmp_path / "out/instruct.json", drawn / "images", Tokenizer(tiny_tokenizer_file), config, "vicuna_v1"
    )
    assert len(examples) == 62 and not report.findings


def test_its_answers_are_right_about_the_scene_that_the_boxes_tell(drawn, tmp_path):
    contexts = read_coco(drawn / "annotations/captions_train.json", drawn / "annotations/instances_train.json")
    right, asked = right_answers(SCENE), set()
    for number in range(60):
        for kind in ("conversation", "reasoning"):
            asked.update(turns_of(kind, RuleTeacher().ask(Request(f"{number}", [], kind, contexts[0])).text))
    assert len(asked) > 60 and len(asked - right) <= 0.05 * len(asked)
    asked_again = RuleTeacher().ask(Request("3", [], "conversation", contexts[0]))
    assert asked_again == RuleTeacher().ask(Request("3", [], "conversation", contexts[0]))
    assert asked_again != RuleTeacher().ask(Request("4", [], "conversation", contexts[0]))


def box(name: str, x: float, y: float) -> dict:
    return {"category": name, "bbox": [x, y, x + 0.1, y + 0.1]}


@pytest.mark.parametrize(
    ("kind", "instances", "words"),
    [
        ("detail", [box("person", 0.1, 0.1)], "knows only the drawn world, and no 'person'"),
        ("detail", [box("large red cat", 0.1, 0.1)], "knows only the drawn world, and no 'large red cat'"),
        ("detail", [], "no scene of the drawn world"),
        ("detail", [box("large red star", 0.1, 0.1), box("small red star", 0.1, 0.1)], "no scene of the drawn world"),
        ("detail", [box("large red star", 0.1, 1.05)], "no scene of the drawn world"),
        ("detail", [box(f"large {c} star", x, 0.1) for c in ("red", "blue") for x in (0.1, 0.6)], "no scene"),
        ("judge", [box("large red star", 0.1, 0.1)], "knows conversation, detail, reasoning, not 'judge'"),
    ],
)
def test_of_anything_else_it_says_that_it_knows_only_its_world(kind, instances, words):
    with pytest.raises(Error, match=words) as error:
        RuleTeacher().ask(Request("a-key", [], kind, Context("1", "a.jpg", ["A cat."], instances)))
    assert "--teacher endpoint" in str(error.value)


def test_the_default_teacher_says_so_of_photographs(tmp_path, capsys):
    told, boxed = coco(tmp_path)
    line = refused(capsys, "--captions", told, "--instances", boxed, "--out", tmp_path / "out", "--kinds", "detail")
    assert "the drawn world" in line and "--teacher endpoint" in line


# ---------------------------------------------------------------- a model in a folder


def local_folder(model, folder: Path) -> Path:
    checkpoint.save_language(model.language, model.tokenizer, folder)
    return folder


def test_a_language_model_in_a_folder_answers(scripted_model, tmp_path):
    folder = local_folder(scripted_model.says("The ball is blue."), tmp_path / "vicuna")
    teacher = LocalTeacher(folder, 0.0, 50)
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is it?"}]
    reply = teacher.ask(Request("a", asked))
    tokenizer = scripted_model.tokenizer
    assert reply.text == "The ball is blue." and not reply.cut and teacher.name.startswith("vicuna")
    assert reply.completion_tokens == len(tokenizer.encode("The ball is blue.", bos=False))
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Be kind.\n\nWhat is it? ASSISTANT:"
    )
    assert reply.prompt_tokens == len(tokenizer.encode(prompt))
    assert LocalTeacher(folder, 0.0, 3).ask(Request("a", asked)).cut
    with pytest.raises(Unanswered, match=r"its prompt takes \d+ positions, and the model has 400"):
        teacher.ask(Request("a", [{"role": "user", "content": "What is it? " * 100}]))


def test_with_a_temperature_each_key_draws_its_own_and_always_the_same(trainer):
    first, second = (LocalTeacher(trainer.vicuna, 1.0, 12) for _ in range(2))
    requests = [Request(key, [{"role": "user", "content": "What?"}]) for key in "abcd"]
    replies = [first.ask(request).text for request in requests]
    assert replies == [second.ask(request).text for request in requests[::-1]][::-1] and len(set(replies)) > 2
    anew = [[t.ask(Request("a", requests[0].messages, attempt=n)).text for n in range(6)] for t in (first, second)]
    assert anew[0] == anew[1] and anew[0][0] == replies[0] and len(set(anew[0])) > 2


def test_a_folder_is_a_teacher_on_the_command_line(scripted_model, drawn, tmp_path, capsys):
    """With short prompts, for the tiny tokenizer reads letter by letter."""
    prompts = tmp_path / "prompts"
    for kind in KINDS:
        (prompts / kind).mkdir(parents=True)
        (prompts / kind / "system_message.txt").write_text("Say it.")
    shutil.copy(FOLDER / "brief.txt", prompts)
    shutil.copy(FOLDER / "detail.txt", prompts)
    folder = local_folder(scripted_model.says("The ball is blue.", positions=2000), tmp_path / "vicuna")
    words = ("--world", drawn, "--out", tmp_path / "out", "--teacher", folder, "--prompts", prompts)
    assert run(*words, "--kinds", "detail", "--records", 3) == 0
    records = json.loads((tmp_path / "out/instruct.json").read_text())
    assert [record["conversations"][1]["value"] for record in records] == ["The ball is blue."] * 3
    assert run(*words, "--kinds", "reasoning", "--records", 2, "--out", tmp_path / "none") == 2
    assert "no record came out (no Question: where one is due)" in capsys.readouterr().err


# ---------------------------------------------------------------- the run and its folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_that_is_over_asks_for_nothing_and_more_records_go_on_from_it(drawn, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", []
    ask = RuleTeacher.ask
    monkeypatch.setattr(RuleTeacher, "ask", lambda self, request: asked.append(request.key) or ask(self, request))
    assert run("--world", drawn, "--out", out, "--records", 20) == 0
    before = contents(out)
    assert len(asked) == 20 and run("--world", drawn, "--out", out, "--records", 20) == 0
    assert len(asked) == 20 and contents(out) == before
    assert run("--world", drawn, "--out", out) == 0
    assert len(asked) == len(set(asked)) == 62
    assert run("--world", drawn, "--out", tmp_path / "fresh") == 0
    assert contents(out)["instruct.json"] == contents(tmp_path / "fresh")["instruct.json"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed", 1], "another seed, 0 and not 1; give the same --seed"),
        (["--prompts", "prompts"], "another prompts"),
        (["--contexts", "contexts.jsonl"], "another input"),
    ],
)
def test_one_folder_takes_no_run_with_other_settings(words, told, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "prompts")
    (tmp_path / "prompts/detail/system_message.txt").write_text("Be short.")
    Path("contexts.jsonl").write_text(json.dumps(LINE))
    assert run("--world", drawn, "--out", "out", "--records", 4) == 0
    before = contents(tmp_path / "out")
    place = () if "--contexts" in words else ("--world", drawn)
    line = refused(capsys, *place, "--out", "out", "--records", 2, *words)
    assert line.startswith("out: the run there began with") and told in line and "choose another --out" in line
    assert contents(tmp_path / "out") == before


def test_what_another_left_in_the_folder_is_neither_gone_on_with_nor_replaced(drawn, tmp_path, capsys):
    words = ("--world", drawn, "--out", tmp_path / "out", "--records", 4)
    assert run(*words) == 0
    (tmp_path / "out/settings.json").unlink()
    (tmp_path / "out/rejected.jsonl").write_text("{}")
    for name in ("replies.jsonl", "rejected.jsonl", "instruct.json"):
        before = contents(tmp_path / "out")
        assert f"out: holds {name}, and no settings.json" in refused(capsys, *words, "--seed", 1)
        assert contents(tmp_path / "out") == before
        (tmp_path / "out" / name).write_text("")
    assert run(*words, "--seed", 1) == 0  # as after a kill before the first reply, and before the settings


def test_tokens_that_somebody_wrote_into_the_journal_in_words_are_not_counted(drawn, tmp_path, capsys):
    words = ("--world", drawn, "--out", tmp_path / "out", "--records", 4)
    assert run(*words) == 0
    file = tmp_path / "out/replies.jsonl"
    file.write_text(file.read_text().replace('"prompt_tokens": 0', '"prompt_tokens": "many"'))
    assert run(*words) == 0 and "Tokens: 0 read" in capsys.readouterr().out


def test_two_runs_in_one_folder_are_one_too_many(drawn, tmp_path, capsys):
    with alone(tmp_path / "out"):
        assert "another run is writing to it" in refused(capsys, "--world", drawn, "--out", tmp_path / "out")
    assert run("--world", drawn, "--out", tmp_path / "out", "--records", 2) == 0


def test_what_is_rejected_is_kept_counted_and_asked_for_again(drawn, tmp_path, monkeypatch, capsys):
    words, ask = ("--world", drawn, "--out", tmp_path / "out", "--records", 20), RuleTeacher.ask

    def clumsy(self, request):
        reply = ask(self, request)
        return reply._replace(text=reply.text.replace("===", "***")) if request.kind == "reasoning" else reply

    with monkeypatch.context() as patch:
        patch.setattr(RuleTeacher, "ask", clumsy)
        assert run(*words) == 0
        told = capsys.readouterr().out
        assert re.search(r"reasoning +10 +0 +10 +-\n", told) and "rejected: 10, see" in told and "--ask-again" in told
        lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
        assert len(lines) == 10 and all("wrong separators" in x["reason"] and "***" in x["text"] for x in lines)
        assert run(*words) == 0  # nothing is asked: the mended teacher below would show
    assert run(*words) == 0 and "rejected: 10" in capsys.readouterr().out
    assert run(*words, "--ask-again") == 0
    assert "rejected:" not in capsys.readouterr().out
    assert (tmp_path / "out/rejected.jsonl").read_text() == ""
    assert run(*words, "--out", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out")["instruct.json"] == contents(tmp_path / "fresh")["instruct.json"]


def test_asked_again_old_replies_stay_until_new_ones_come_and_their_tokens_count(drawn, tmp_path, monkeypatch, capsys):
    """20 replies of 100 and 10 tokens, of which 10 are rejected; of these 9 are answered anew, then the last."""
    words, ask = ("--world", drawn, "--out", tmp_path / "out", "--records", 20), RuleTeacher.ask
    mended, silent, attempts = [False], [], Counter()

    def costly(self, request):
        attempts[request.attempt] += 1
        if request.key in silent:
            raise Unanswered("503 Service Unavailable")
        text = ask(self, request).text
        return Reply(text if mended[0] or request.kind != "reasoning" else text.replace("===", "***"), 100, 10)

    monkeypatch.setattr(RuleTeacher, "ask", costly)
    assert run(*words) == 0 and "Tokens: 2,000 read and 200 written" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    mended[0] = True
    silent.append(lines[3]["key"])
    assert run(*words, "--ask-again") == 1
    told = capsys.readouterr().out
    assert "Tokens: 2,900 read and 290 written" in told and "rejected: 1, see" in told and "unanswered: 1;" in told
    assert json.loads((tmp_path / "out/rejected.jsonl").read_text()) == lines[3]
    silent.clear()
    assert run(*words, "--ask-again") == 0 and "Tokens: 3,000 read and 300 written" in capsys.readouterr().out
    assert run(*words, "--ask-again") == 0 and "Tokens: 3,000 read and 300 written" in capsys.readouterr().out
    assert attempts == {0: 20, 1: 11}


def test_each_attempt_has_a_number(drawn, tmp_path, monkeypatch, capsys):
    """By which a teacher that draws can draw anew, in another process too."""
    words, numbers = ("--world", drawn, "--out", tmp_path / "out", "--records", 1), []
    monkeypatch.setattr(RuleTeacher, "ask", lambda self, request: numbers.append(request.attempt) or Reply("", 0, 0))
    assert [run(*words, *more) for more in ((), ["--ask-again"], (), ["--ask-again"])] == [2] * 4
    assert numbers == [0, 1, 2] and len((tmp_path / "out/replies.jsonl").read_text().splitlines()) == 3


def test_where_the_mark_stands_depends_on_seed_and_key_alone(drawn, tmp_path):
    def marks(name: str, *words: object) -> dict[tuple[str, str], bool]:
        assert run("--world", drawn, "--out", tmp_path / name, *words) == 0
        records = json.loads((tmp_path / name / "instruct.json").read_text())
        return {(r["id"], r["kind"]): r["conversations"][0]["value"].startswith("<image>") for r in records}

    some, every, other = marks("a", "--records", 20), marks("b"), marks("c", "--seed", 1)
    assert some.items() <= every.items()
    assert sum(every[key] != other[key] for key in every.keys() & other.keys()) > 10


def test_a_dry_run_prints_a_prompt_of_each_kind_and_asks_nobody(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_teacher", None)
    assert run("--world", drawn, "--dry-run", "--teacher", "endpoint", "--records", 10, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    prompts = read_prompts(FOLDER)
    for kind in KINDS:
        assert all(message["content"] in told for message in prompts.beginnings[kind])
    plan = make_plan(command.read_input(command.arguments(["--world", str(drawn)])), list(KINDS), 10, 0)
    read = sum(estimate(m["content"]) + 4 for i in plan for m in prompts.messages(i.kind, i.context))
    examples = [m["content"] for m in prompts.beginnings["detail"] if m["role"] == "assistant"]
    assert re.search(rf"detail +1 +[\d,]+ +{sum(map(estimate, examples)) // 3}\n", told)
    assert re.search(rf"all +10 +{read:,} +[\d,]+\n", told) and "Estimated: a word" in told


def test_a_dry_run_of_which_only_the_first_lines_are_read_ends_quietly(drawn, monkeypatch):
    """As in  python -m nanollava.instruct ... --dry-run | head."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as closed:
        patch.setattr(sys, "stdout", closed)
        assert run("--world", drawn, "--dry-run") == 1


def test_an_id_of_many_digits_is_a_name():
    assert [name_of(x) for x in (42, "42", "00000000000042", "9" * 5000)] == [*["000000000042"] * 3, "9" * 5000]


def test_stage_1_gets_brief_questions_with_captions(drawn, tiny_tokenizer_file, tmp_path, capsys):
    out = tmp_path / "deep" / "captions.json"
    told = drawn / "annotations/captions_train.json"
    assert run("brief", "--captions", told, "--out", out) == 0
    assert "30 records for stage 1" in capsys.readouterr().out
    records, questions = json.loads(out.read_text()), read_prompts(FOLDER).brief
    by_id = {f"{image.id:012d}": image for image in world.read_split(drawn, "train")}
    assert [record["id"] for record in records] == list(by_id)
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.replace("<image>\n", "").replace("\n<image>", "") in questions and "<image>" in question
        assert answer in by_id[record["id"]].captions and record["image"] == by_id[record["id"]].name
    assert len({record["conversations"][0]["value"] for record in records}) > 8
    examples, report = read_records(out, drawn / "images", Tokenizer(tiny_tokenizer_file), LlavaConfig(), "plain")
    assert len(examples) == 30 and not report.problems
    assert run("brief", "--captions", told, "--out", tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()
    assert run("brief", "--captions", told, "--out", tmp_path / "other.json", "--seed", 1) == 0
    assert (tmp_path / "other.json").read_bytes() != out.read_bytes()
    assert f"--out {tmp_path}: is a folder" in refused(capsys, "brief", "--captions", told, "--out", tmp_path)
    before = told.read_bytes()
    assert f"--out {told}: is {told}, which is read" in refused(capsys, "brief", "--captions", told, "--out", told)
    assert told.read_bytes() == before


def test_ctrl_c_in_brief_says_that_nothing_is_there(drawn, tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(brief, "record_of", interrupted)
    words = ("--captions", drawn / "annotations/captions_train.json", "--out", tmp_path / "out.json")
    assert run("brief", *words) == 130 and capsys.readouterr().err == "\nstopped: nothing was written\n"
    assert not (tmp_path / "out.json").exists()


def test_without_openai_the_endpoint_says_what_to_install(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    words = ("--teacher", "endpoint", "--teacher-model", "m", "--base-url", "http://localhost:1/v1")
    line = refused(capsys, "--world", drawn, "--out", tmp_path / "out", *words)
    assert line == '--teacher endpoint needs the openai library: pip install -e ".[teacher]"'


def test_the_folder_of_prompts_is_beside_the_code():
    assert messages.FOLDER.is_dir() and messages.FOLDER.parent == Path(command.__file__).parent
