"""Damaged folders, as downloads, disks and hands leave them: each is one line that names the file and the trouble, exit
status 2, and nothing is written."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
from nanollava import convert

GOLDEN = Path(__file__).parent / "golden"
INDEX = "pytorch_model.bin.index.json"


def config(**fields) -> Callable[[Path], None]:
    """Set fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


def text(**fields) -> Callable[[Path], None]:
    """Set fields of llava-hf's text_config."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["text_config"] |= fields
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def tensors(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        edit(content)
        save_file(content, folder / "model.safetensors")

    return damage


def binary(content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "pytorch_model.bin")


def index(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "pytorch_model.bin").unlink()
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


class Code:
    """What a hostile pickle does: it would make a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def hostile(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Code()}, protocol=2))


def tower(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage what stands beside the folder."""
    return lambda folder: damage(folder.parent / "clip")


NORM = "language_model.model.norm.weight"
HF = {  # everything in model.safetensors, the image tower too
    "no config": (remove("config.json"), "config.json: no such file"),
    "config cut short": (cut("config.json", 0.7), "config.json: cannot be read as JSON"),
    "config that is a list": (write("config.json", "[1]"), "holds a list"),
    "config of zero bytes": (write("config.json", ""), "cannot be read as JSON"),
    "no model_type": (config(model_type=None), '"model_type" is missing'),
    "another kind of model": (config(model_type="mistral"), 'model_type is "mistral"'),
    "no vision_config": (config(vision_config=None), "are not those that config.json promises"),
    "vision_config of text": (config(vision_config="ViT"), "'ViT'"),
    "heads that do not divide": (text(num_attention_heads=5), "num_attention_heads 5"),
    "size of text": (text(hidden_size="wide"), "hidden_size"),
    "negative size": (text(intermediate_size=-20), "intermediate_size"),
    "size beyond belief": (text(vocab_size=10**12), "vocab_size"),
    "sizes beyond all computers": (
        config(vision_config={"image_size": 2**20, "patch_size": 1, "hidden_size": 2**20, "num_attention_heads": 1}),
        "of another shape",
    ),
    "more layers than there are": (text(num_hidden_layers=3), "missing"),
    "fewer layers than there are": (text(num_hidden_layers=1), "not expected"),
    "another width inside": (text(intermediate_size=21), "of another shape"),
    "scaled positions": (text(rope_parameters={"rope_type": "yarn", "rope_theta": 5.0}), "rope_type"),
    "another activation": (text(hidden_act="gelu"), "hidden_act"),
    "weights of zero bytes": (write("model.safetensors", b""), "0 bytes"),
    "weights cut short": (cut("model.safetensors", 0.9), "damaged or incomplete"),
    "weights cut in their header": (cut("model.safetensors", 0.01), "damaged or incomplete"),
    "weights that are a web page": (write("model.safetensors", "<html>404</html>" * 9), "damaged or incomplete"),
    "weights that are an LFS pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"
    ),
    "no weights": (remove("model.safetensors"), "no weights in it"),
    "a tensor missing": (tensors(lambda t: t.pop(NORM)), f"1 ({NORM}) missing"),
    "a tensor too many": (tensors(lambda t: t.update(strange=torch.ones(1))), "1 (strange) not expected"),
    "a tensor turned round": (tensors(lambda t: t.update({NORM: torch.ones(25)})), "(25,) for (24,)"),
    "a number that is none": (tensors(lambda t: t[NORM].fill_(torch.nan)), f"1 ({NORM}) tensors hold NaN"),
    "infinity": (tensors(lambda t: t[NORM][3:4].fill_(torch.inf)), f"1 ({NORM}) tensors hold NaN"),
    "integers": (tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "integers"),
    "complex numbers": (tensors(lambda t: t.update({NORM: t[NORM].to(torch.complex64)})), f"1 ({NORM}) tensors hold"),
    "tokenizer of zero bytes": (write("tokenizer.model", b""), "tokenizer.model: the file is empty"),
    "tokenizer that is a web page": (write("tokenizer.model", "<html>"), "not a SentencePiece model"),
    "tokenizer of another model": (
        lambda folder: shutil.copy(GOLDEN.parents[1] / "weights/miniature/tokenizer.model", folder) and None,
        "but the embedding has 50 rows",
    ),
    "template of nobody": (config(template="v9"), "template"),
}  # fmt: skip
OFFICIAL = {  # a .bin, the image tower in the folder beside it
    "bin cut short": (cut("pytorch_model.bin", 0.8), "damaged, or no file of weights"),
    "bin of zero bytes": (write("pytorch_model.bin", b""), "0 bytes"),
    "bin of garbage": (write("pytorch_model.bin", b"\x80\x02garbage"), "damaged, or no file of weights"),
    "bin that would run code": (hostile, "damaged, or no file of weights"),
    "bin of a list": (binary([torch.ones(1)]), "expected a dictionary of tensors"),
    "bin of other things": (binary({"model.norm.weight": 3}), "expected a dictionary of tensors"),
    "bin of shapes without numbers": (
        lambda folder: torch.save(
            {name: tensor.to("meta") for name, tensor in torch.load(folder / "pytorch_model.bin").items()},
            folder / "pytorch_model.bin",
        ),
        "without numbers; give plain ones",
    ),
    "bin of sparse tensors": (binary({"model.norm.weight": torch.eye(24).to_sparse()}), "sparse"),
    "index of absent shards": (index({"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}), "1 shards missing"),
    "index without a map": (index({"metadata": {}}), "weight_map"),
    "index that is no JSON": (index("{"), INDEX),
    "index that leads out": (index({"weight_map": {"x": "../clip/pytorch_model.bin"}}), "outside its folder"),
    "no feature layer": (config(mm_vision_select_layer=None), '"mm_vision_select_layer" is missing'),
    "feature layer beyond the tower": (config(mm_vision_select_layer=-9), "the tower has 3 layers"),
    "unknown projector": (config(mm_projector_type="ldpnetv2"), "mm_projector_type"),
    "class token kept": (config(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature"),
    "tower of another width": (config(mm_hidden_size=1024), "give the tower that mm_vision_tower names"),
    "no tower": (config(mm_vision_tower="openai/clip-gone"), "hf download openai/clip-gone"),
    "damaged tower": (tower(cut("pytorch_model.bin", 0.5)), "clip/pytorch_model.bin: damaged"),
    "tower that is a decoder": (tower(config(model_type="llama")), 'model_type is "llama"'),
    "tower of another activation": (tower(config(vision_config={"hidden_act": "gelu"})), "hidden_act"),
    "legacy of text": (write("tokenizer_config.json", '{"legacy": "yes"}'), "legacy"),
    "added tokens in a list": (write("added_tokens.json", "[]"), "added_tokens.json"),
}  # fmt: skip
CASES = [("llava-hf", *case) for case in HF.items()] + [("llava", *case) for case in OFFICIAL.items()]


@pytest.mark.parametrize("command", ["chat", "export"])
@pytest.mark.parametrize(("kind", "name", "case"), CASES, ids=[name for _, name, _ in CASES])
def test_a_damaged_folder_is_one_line_and_leaves_no_trace(
    kind, name, case, command, tmp_path, tiny_tokenizer_file, capsys
):
    damage, words = case
    folder = Path(shutil.copytree(GOLDEN / kind, tmp_path / "weights"))
    shutil.copytree(GOLDEN / "clip", tmp_path / "clip")
    if kind == "llava":
        shutil.copy(tiny_tokenizer_file, folder / "tokenizer.model") if "legacy" in name or "added" in name else None
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    started = time.process_time()
    if command == "chat":
        assert chat.main([str(folder), "--ask", "What is this?", "--device", "cpu"]) == 2
    else:
        assert convert.main(["export", "--as", "llava", str(folder), str(tmp_path / "out")]) == 2
    assert time.process_time() - started < 1  # second, of this process alone
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and words in line, line
    assert sorted(tmp_path.rglob("*")) == before and not Path("pwned").exists()
