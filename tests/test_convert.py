"""Checkpoint folders turned into others: the same tensors under the same names."""

import json
import shutil
import zipfile

import pytest
import torch

from nanollava import convert
from nanollava.checkpoint import load, save
from nanollava.folder import tensors, weight_files
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import Tokenizer, load_tokenizer
from nanollava.vit import VisionConfig


@pytest.fixture
def source(tmp_path):
    """As official folders: two .bin shards in two dtypes with their index, a config, a tokenizer, a projector apart."""
    folder = tmp_path / "source"
    folder.mkdir()
    shards = {
        "pytorch_model-00001-of-00002.bin": {"a": torch.randn(3, 4).half(), "b": torch.randn(5)},
        "pytorch_model-00002-of-00002.bin": {"c": torch.randn(2, 2).T},  # not contiguous
    }
    for name, content in shards.items():
        torch.save(content, folder / name)
    weight_map = {tensor: name for name, content in shards.items() for tensor in content}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.model").write_bytes(b"pieces")
    torch.save({"x": torch.ones(1)}, folder / "mm_projector.bin")
    return folder


def read(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for file in weight_files(folder) for name, tensor in tensors(file)}


def test_every_tensor_is_the_same_and_the_small_files_come_along(source, tmp_path, capsys):
    assert convert.main(["to-safetensors", str(source), str(tmp_path / "out")]) == 0
    before, after = read(source), read(tmp_path / "out")
    assert before.keys() == after.keys() == {"a", "b", "c"}
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 4 * 2 + 5 * 4 + 4 * 4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.model",
    ]  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_bin_that_somebody_compressed_is_read_as_what_it_is(source, tmp_path):
    """Its tensors do not stand in the file as they do in memory, so it cannot be mapped."""
    before = read(source)
    for file in weight_files(source):
        with zipfile.ZipFile(file) as stored:
            entries = [(entry, stored.read(entry)) for entry in stored.infolist()]
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as smaller:
            for entry, content in entries:
                smaller.writestr(entry.filename, content)
    convert.to_safetensors(source, tmp_path / "out")
    after = read(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tower_in_the_folder_comes_along(source, tmp_path):
    (source / "vision_tower").mkdir()
    (source / "vision_tower/pytorch_model.bin").write_bytes(b"tower")
    convert.to_safetensors(source, tmp_path / "out")
    assert (tmp_path / "out/vision_tower/pytorch_model.bin").read_bytes() == b"tower"


def test_a_target_inside_its_source_is_refused(source, capsys):
    (source / "vision_tower").mkdir()
    assert convert.main(["to-safetensors", str(source), str(source / "vision_tower/x")]) == 2
    assert "which it is made from" in capsys.readouterr().err and not list((source / "vision_tower").iterdir())


def test_ctrl_c_is_no_traceback_and_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "copy_settings", pressed)
    assert convert.main(["to-safetensors", str(source), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "\n" and not list(tmp_path.glob("*out*"))


def test_one_file_stays_one_and_shared_matrices_are_written_twice(source, tmp_path):
    for file in source.glob("pytorch_model*"):
        file.unlink()
    matrix = torch.randn(3, 3)
    torch.save({"embedding": matrix, "head": matrix}, source / "pytorch_model.bin")
    convert.to_safetensors(source, tmp_path / "out")
    assert [file.name for file in weight_files(tmp_path / "out")] == ["model.safetensors"]
    after = read(tmp_path / "out")
    assert torch.equal(after["head"], matrix) and torch.equal(after["embedding"], matrix)


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(source, tmp_path, capsys):
    convert.to_safetensors(source, tmp_path / "done")
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    for src, dst, words in (
        (tmp_path / "nowhere", "out", "no such folder"),
        (source / "config.json", "out", "no such folder"),
        (tmp_path / "empty", "out", "no weights"),
        (tmp_path / "done", "out", "already"),
        (source, "there", "exists"),
    ):
        capsys.readouterr()
        assert convert.main(["to-safetensors", str(src), str(tmp_path / dst)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1
    (source / "pytorch_model-00002-of-00002.bin").write_bytes(b"half")
    assert convert.main(["to-safetensors", str(source), str(tmp_path / "out")]) == 2
    assert "00002-of-00002.bin: damaged" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done", "empty", "source", "there"]


# ---------------------------------------------------------------- a LLaVA in other layouts


def small_llava(tokenizer: Tokenizer | None, rows: int = 400, **settings) -> Llava:
    torch.manual_seed(0)
    vision, language = VisionConfig(24, 8, 30, 44, 4, 5), LlamaConfig(rows, 48, 56, 3, 6, 2, rms_norm_eps=1e-5)
    settings = {"projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad", "max_length": 99} | settings
    return Llava(LlavaConfig(vision, language, **settings), tokenizer).eval()


@pytest.mark.parametrize("kind", ["llava-hf", "llava"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_to_theirs_and_back_is_the_same_to_the_bit(kind, dtype, tiny_tokenizer_file, tmp_path):
    model = small_llava(Tokenizer(tiny_tokenizer_file), template="llava_v1", stage="stage2", select_layer=-3)
    save(model, tmp_path / "ours", dtype)
    words = ["export", "--as", kind, str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert convert.main(words) == 0
    before, after = load(tmp_path / "ours", dtype=dtype), load(tmp_path / "theirs", dtype=dtype)
    assert before.config == after.config and before.state_dict().keys() == after.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    stored = {value.dtype for file in weight_files(tmp_path / "theirs") for _, value in tensors(file)}
    assert stored == {dtype}
    assert after.tokenizer.encode("A small red star.") == model.tokenizer.encode("A small red star.")


@pytest.mark.parametrize(("rows", "added"), [(400, {}), (448, {}), (401, {"[PAD]": 400})])
def test_what_came_from_llava_hf_is_saved_and_read_again(rows, added, tiny_tokenizer_file, tmp_path):
    """With the rows that it had: those for <image> and <pad> are gone, and so are their names."""
    shutil.copy(tiny_tokenizer_file, tmp_path / "tokenizer.model")
    if added:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    model = small_llava(load_tokenizer(tmp_path), rows)
    save(model, tmp_path / "ours")
    convert.export(tmp_path / "ours", tmp_path / "hf", "llava-hf")
    convert.export(tmp_path / "hf", tmp_path / "back", "llava")
    back = load(tmp_path / "back")
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


def test_of_two_dtypes_the_one_that_holds_both_is_kept(tiny_tokenizer_file, tmp_path):
    model = small_llava(Tokenizer(tiny_tokenizer_file))
    model.language.bfloat16()
    save(model, tmp_path / "ours")
    convert.export(tmp_path / "ours", tmp_path / "out", "llava")
    assert all(tensor.dtype == torch.float32 for tensor in read(tmp_path / "out").values())
    back = load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


def test_the_dtype_kept_is_that_of_the_weights_not_of_tables_beside_them(tiny_tokenizer_file, tmp_path):
    save(small_llava(Tokenizer(tiny_tokenizer_file)), tmp_path / "ours", torch.float16)
    stored = read(tmp_path / "ours")
    (tmp_path / "ours/model.safetensors").unlink()
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "x.embeddings.position_ids": torch.arange(3),
    }
    torch.save(tables | stored, tmp_path / "ours/pytorch_model.bin")
    convert.export(tmp_path / "ours", tmp_path / "out", "llava")
    assert {value.dtype for value in read(tmp_path / "out").values()} == {torch.float16}


def test_no_folder_is_replaced_however_it_is_called(source, tmp_path, capsys):
    before = read(source)
    assert convert.main(["to-safetensors", str(source), f"{tmp_path}/nowhere/../source"]) == 2
    assert "exists" in capsys.readouterr().err and read(source).keys() == before.keys()


def test_fp16_is_half_the_size(tiny_tokenizer_file, tmp_path):
    save(small_llava(Tokenizer(tiny_tokenizer_file)), tmp_path / "ours")
    for kind in ("llava-hf", "llava"):
        words = ["export", "--as", kind, "--fp16", str(tmp_path / "ours"), str(tmp_path / kind)]
        assert convert.main(words) == 0
        assert {value.dtype for file in weight_files(tmp_path / kind) for _, value in tensors(file)} == {torch.float16}


def test_the_added_rows_are_never_the_likeliest(tmp_path):
    """Where all logits are below zero, rows of zeros would be."""
    model = small_llava(None)
    model.language.lm_head.weight.data.copy_(-model.language.embed_tokens.weight.abs())
    save(model, tmp_path / "ours")
    convert.export(tmp_path / "ours", tmp_path / "theirs", "llava-hf")
    wide = read(tmp_path / "theirs")["language_model.lm_head.weight"]
    assert len(wide) == 448
    hidden = torch.randn(50, 48)
    assert ((hidden @ wide.T).argmax(dim=1) < 400).all()


def test_a_linear_projector_is_not_llava_hf_s(tmp_path, capsys):
    save(small_llava(None, projector_type="linear"), tmp_path / "ours")
    assert convert.main(["export", "--as", "llava-hf", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    assert "knows only mlp2x_gelu" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert convert.main(["export", "--as", "llava", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0


# ---------------------------------------------------------------- official sizes


def mlp(C: int, D: int) -> int:
    return C * D + D + D * D + D


@pytest.mark.parametrize(
    ("name", "language", "width"), [("llava-1.5-7b", 6_738_415_616, 4096), ("llava-1.5-13b", 13_015_864_320, 5120)]
)
def test_official_sizes_have_the_published_parts(name, language, width):
    """Counts of Vicuna and of CLIP ViT-L/14 at 336 pixels; a file of the projector alone has 41,959,424 bytes at 7B."""
    with torch.device("meta"):
        model = Llava(convert.OFFICIAL[name])
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert [count(part) for part in (model.language, model.vision, model.projector)] == [
        language, 303_507_456, mlp(1024, width)
    ]  # fmt: skip
    assert mlp(1024, 4096) * 2 == 41_959_424
    tensors = 291 if width == 4096 else 363
    assert (len(model.language.state_dict()), len(model.vision.state_dict())) == (tensors, 391)
    assert (model.config.vision.num_patches, model.config.image_aspect_ratio) == (576, "pad")


@pytest.fixture
def tiny(monkeypatch) -> None:
    vision, language = VisionConfig(24, 8, 30, 44, 4, 5), LlamaConfig(400, 48, 56, 3, 6, 2)
    monkeypatch.setattr(convert, "OFFICIAL", {"tiny": LlavaConfig(vision, language, "mlp2x_gelu")})
    monkeypatch.setattr(convert, "SHARD", 50_000)


def test_random_weights_load_by_themselves_and_converse(tiny, tiny_tokenizer_file, tmp_path):
    out = tmp_path / "random"
    words = ["make-random", "--like", "tiny", "--tokenizer", str(tiny_tokenizer_file), str(out)]
    assert convert.main(words) == 0
    shards = weight_files(out)
    assert len(shards) > 3 and all(file.stat().st_size < 60_000 for file in shards)
    stored = [tensor for file in shards for _, tensor in tensors(file)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored) and len(index["weight_map"]) == len(stored)
    model = load(out, dtype=torch.bfloat16)
    matrices = torch.cat([p.flatten().float() for p in model.language.layers.parameters() if p.ndim == 2])
    assert abs(matrices.mean()) < 1e-3 and abs(matrices.std() - 0.02) < 1e-3
    assert (model.language.norm.weight == 1).all()
    assert isinstance(model.answer(None, "What is this?", max_new_tokens=4), str)


def test_random_weights_need_a_tokenizer_that_fits(tiny, tmp_path, train_tokenizer, capsys):
    train_tokenizer(tmp_path / "tokenizer.model", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols="aaa")
    convert.OFFICIAL["tiny"].language.vocab_size = 399
    words = ["make-random", "--like", "tiny", "--tokenizer", str(tmp_path / "tokenizer.model"), str(tmp_path / "out")]
    assert convert.main(words) == 2
    assert "399 rows" in capsys.readouterr().err and not (tmp_path / "out").exists()
