"""Checkpoint folders turned into others: the same tensors under the same names."""

import json

import pytest
import torch

from nanollava import convert
from nanollava.folder import tensors, weight_files


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
        (tmp_path / "nowhere", "out", "no weights"),
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
