"""Checkpoint folders: what is saved is what is loaded, and whatever is wrong with a folder is said in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanollava import checkpoint, weights
from nanollava.checkpoint import load, load_language, load_vision, save, save_language, save_vision
from nanollava.error import Error
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from nanollava.vit import VisionConfig, VisionTransformer

# no two sizes equal by accident
VISION = VisionConfig(
    image_size=20, patch_size=5, hidden_size=12, intermediate_size=28, num_hidden_layers=3, num_attention_heads=2,
    layer_norm_eps=1e-4,
)  # fmt: skip
LANGUAGE = {
    "vocab_size": 400, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 99,
}  # fmt: skip


@pytest.fixture
def tokenizer(tiny_tokenizer_file):
    return Tokenizer(tiny_tokenizer_file, legacy=False)


def make(tokenizer=None, tied: bool = False, **settings) -> Llava:
    torch.manual_seed(0)
    config = LlavaConfig(VISION, LlamaConfig(**LANGUAGE, tie_word_embeddings=tied), **settings)
    return Llava(config, tokenizer).eval()


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert one.config == other.config
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def edit_config(folder: Path, **fields) -> None:
    """Set fields of a folder's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---------------------------------------------------------------- round trips


V1 = {"projector_type": "linear", "stage": "stage1", "template": "plain", "select_layer": -1}
V15 = {"projector_type": "mlp2x_gelu", "stage": "stage2", "image_aspect_ratio": "pad", "max_length": 77}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [V1, V15], ids=["v1", "v1.5"])
def test_llava_round_trip(tmp_path, tokenizer, settings, tied):
    model = make(tokenizer, tied, **settings)
    save(model, tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert_same(model, loaded)
    assert loaded.tokenizer.legacy is False and loaded.tokenizer.vocab_size == 400 and not loaded.training
    assert (loaded.language.lm_head.weight is loaded.language.embed_tokens.weight) == tied
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    token_ids, pixels = torch.tensor([[1, 7, -200, 9]]), torch.randn(1, 3, 20, 20)
    assert torch.equal(model(token_ids, pixels), loaded(token_ids, pixels))


def test_official_names_are_on_disk(tmp_path, tokenizer):
    save(make(tokenizer, projector_type="mlp2x_gelu"), tmp_path / "run")
    names = load_file(tmp_path / "run" / "model.safetensors").keys()
    assert {
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "lm_head.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
    } < names
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["mm_vision_select_layer"] == -2


def test_parts_round_trip_through_official_folders(tmp_path, tokenizer):
    model = make()
    save_vision(model.vision, tmp_path / "clip")
    save_language(model.language, tokenizer, tmp_path / "vicuna")
    assert_same(load_vision(tmp_path / "clip"), model.vision)
    assert_same(load_language(tmp_path / "vicuna"), model.language)
    assert checkpoint.load_tokenizer(tmp_path / "vicuna").legacy is False


def test_saving_over_the_folder_that_was_loaded(tmp_path, tokenizer):
    save(make(tokenizer), tmp_path / "run")
    model = load(tmp_path / "run")
    with torch.no_grad():
        model.projector.weight += 1
    save(model, tmp_path / "run")
    assert_same(load(tmp_path / "run"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_small_and_read_as_asked(tmp_path, dtype):
    model = make()
    save(model, tmp_path / "run", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()} == {dtype}
    assert_same(load(tmp_path / "run", dtype=dtype), model.to(dtype))
    assert load(tmp_path / "run").language.norm.weight.dtype == torch.float32  # what a CPU computes in


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_model_and_its_file_do_not_change_each_other(ending, tmp_path):
    """Its weights may lie in the file's pages: what is written to them is its own, and a new file is another one."""
    saved, file = make(), tmp_path / "run/model.safetensors"
    save(saved, tmp_path / "run")
    if ending == "bin":
        torch.save(load_file(file), tmp_path / "run/pytorch_model.bin")
        file.unlink()
        file = tmp_path / "run/pytorch_model.bin"
    model, content = load(tmp_path / "run"), file.read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == content
    unchanged = load(tmp_path / "run")
    save(model, tmp_path / "run")
    assert_same(unchanged, saved)
    assert_same(load(tmp_path / "run"), model)


PEAK = """
import re, sys
import nanollava.checkpoint
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
nanollava.folder.AT_ONCE = 2**22  # what is read of a file before it is opened anew
before = peak()
model = nanollava.checkpoint.load_language(sys.argv[1])
bytes = sum(p.nbytes for p in model.parameters())
print((peak() - before) / bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells the peak")
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_loading_takes_the_memory_of_the_weights_once(ending, tmp_path):
    """Once, not twice; of 400 MB, what PyTorch takes for itself (up to 80 MB) is a fifth, of 7B nothing."""
    model = Llama(LlamaConfig(1000, 2048, 4096, 3, 16))
    save_language(model, None, tmp_path / "run")
    if ending == "bin":
        torch.save(load_file(tmp_path / "run/model.safetensors"), tmp_path / "run/pytorch_model.bin")
        (tmp_path / "run/model.safetensors").unlink()
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(found.stdout) < 1.3


# ---------------------------------------------------------------- official variants


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_with_an_index(tmp_path, ending):
    model = make()
    save(model, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "model.safetensors").unlink()
    kind, index = "model" if ending == "safetensors" else "pytorch_model", {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        part, file = {name: tensors[name] for name in names}, f"{kind}-0000{i + 1}-of-00002.{ending}"
        (save_file if ending == "safetensors" else torch.save)(part, tmp_path / "run" / file)
        index |= dict.fromkeys(names, file)
    (tmp_path / "run" / f"{kind}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same(load(tmp_path / "run"), model)


def test_a_whole_clip_and_one_without_prefix(tmp_path):
    tower = make().vision
    save_vision(tower, tmp_path / "clip")
    fields = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": fields}))
    unneeded = ["text_model.x", "logit_scale", "visual_projection.weight", "text_projection.weight"]
    unneeded.append("vision_model.embeddings.position_ids")
    edit_tensors(tmp_path / "clip", lambda tensors: tensors.update({name: torch.ones(2) for name in unneeded}))
    assert_same(load_vision(tmp_path / "clip"), tower)

    def without_prefix(tensors):
        for name in [name for name in tensors if name.startswith("vision_model.")]:
            tensors[name.removeprefix("vision_model.")] = tensors.pop(name)

    edit_tensors(tmp_path / "clip", without_prefix)
    assert_same(load_vision(tmp_path / "clip"), tower)


def test_old_and_new_forms_of_a_llama_config(tmp_path):
    model = make().language
    save_language(model, None, tmp_path / "llama")
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    edit_config(tmp_path / "llama", rope_theta=None, rope_parameters=rope, torch_dtype=None, dtype="float32")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    edit_tensors(tmp_path / "llama", lambda tensors: tensors.update(table))
    assert_same(load_language(tmp_path / "llama"), model)


def test_a_null_is_an_absent_field(tmp_path):
    model = make().language
    save_language(model, None, tmp_path / "llama")
    edit_config(tmp_path / "llama", rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    config = json.loads((tmp_path / "llama/config.json").read_text()) | {"rope_theta": None}
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    assert load_language(tmp_path / "llama").config.rope_theta == 5000.0


def test_absent_fields_have_the_official_defaults(tmp_path):
    torch.manual_seed(0)
    sizes = {name: value for name, value in LANGUAGE.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    save_language(Llama(LlamaConfig(**sizes)), None, tmp_path / "llama")
    absent = ("num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings", "hidden_act")
    edit_config(tmp_path / "llama", **dict.fromkeys(absent))
    config = load_language(tmp_path / "llama").config
    assert (config.num_key_value_heads, config.rms_norm_eps, config.head_dim) == (6, 1e-6, 4)
    save(make(), tmp_path / "llava")
    edit_config(tmp_path / "llava", mm_projector_type=None, image_aspect_ratio=None, template=None, stage=None)
    config = load(tmp_path / "llava").config
    assert (config.projector_type, config.image_aspect_ratio, config.stage) == ("linear", "crop", "")


def test_where_the_image_tower_is_sought(tmp_path):
    model, other = make(), VisionTransformer(VISION)
    run = tmp_path / "llava"
    save(model, run)
    edit_tensors(run, lambda t: [t.pop(name) for name in list(t) if "vision_tower" in name])
    edit_config(run, mm_vision_tower="openai/clip-small", vision_config=None)
    with pytest.raises(Error, match="clip-small") as caught:
        load(run)
    for place in (
        run / "vision_tower",
        tmp_path / "clip-small",
        "--vision",
        "hf download openai/clip-small config.json",
    ):
        assert str(place) in str(caught.value)
    save_vision(model.vision, tmp_path / "elsewhere")
    assert_same(load(run, vision=tmp_path / "elsewhere"), model)
    save(model, tmp_path / "whole")
    with pytest.raises(Error, match="tower of its own"):
        load(tmp_path / "whole", vision=tmp_path / "elsewhere")
    save_vision(other, tmp_path / "clip-small")  # beside it
    assert_same(load(run).vision, other)
    save_vision(model.vision, run / "vision_tower")  # inside: before the one beside it
    assert_same(load(run), model)
    assert_same(load(run, vision=tmp_path / "clip-small").vision, other)  # whoever names one gets it
    with pytest.raises(Error, match="nowhere"):
        load(run, vision=tmp_path / "nowhere")
    edit_config(run, mm_hidden_size=1024)
    with pytest.raises(Error, match="1024, but the image tower is 12 wide"):
        load(run)


def test_a_fork_that_holds_its_tower_takes_the_sizes_from_the_tower_s_own_folder(tmp_path):
    model = make()
    save(model, tmp_path / "fork")
    edit_config(tmp_path / "fork", vision_config=None, mm_vision_tower="openai/clip-small")
    save_vision(VisionTransformer(VISION), tmp_path / "clip-small")
    assert_same(load(tmp_path / "fork"), model)
    (tmp_path / "clip-small").rename(tmp_path / "elsewhere")
    assert_same(load(tmp_path / "fork", vision=tmp_path / "elsewhere"), model)


# ---------------------------------------------------------------- bad folders


def refused(folder: Path, match: str, read=load) -> None:
    with pytest.raises(Error, match=match) as caught:
        read(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


MISMATCHES = [
    ({"vision_config": None}, "config of its image tower"),
    ({"num_hidden_layers": 3}, r"9 \(model.layers.2.input_layernorm.weight, .*\) missing"),
    ({"num_hidden_layers": 1}, r"9 \(model.layers.1.*\) not expected"),
    ({"intermediate_size": 41}, r"6 \(model.layers.0.mlp.down_proj.weight is \(24, 40\) for \(24, 41\)"),
]


@pytest.mark.parametrize(("fields", "match"), MISMATCHES, ids=lambda value: str(value)[:40])
def test_configs_that_promise_something_else(tmp_path, fields, match):
    save(make(), tmp_path / "run")
    edit_config(tmp_path / "run", **fields)
    refused(tmp_path / "run", match)


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.mm_projector.bias"]
        tensors["model.strange"] = torch.ones(2)
        tensors["lm_head.weight"] = torch.ones(3, 24)

    save(make(), tmp_path / "run")
    edit_tensors(tmp_path / "run", damage)
    refused(tmp_path / "run", r"2 \(model.mm_projector.bias, model.norm.weight\) missing; 1 \(model.strange\) not "
            r"expected; 1 \(lm_head.weight is \(3, 24\) for \(400, 24\)\) of another shape")  # fmt: skip


def test_tensors_that_are_not_numbers_and_double_names(tmp_path):
    save(make(), tmp_path / "run")
    edit_tensors(tmp_path / "run", lambda t: t["model.mm_projector.weight"].view(-1)[3].fill_(float("nan")))
    edit_tensors(tmp_path / "run", lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}))
    refused(tmp_path / "run", r"2 \((?=.*model.norm.weight)(?=.*model.mm_projector.weight).*\) tensors hold NaN")
    save_vision(make().vision, tmp_path / "clip")
    edit_tensors(tmp_path / "clip", lambda t: t.update({"pre_layrnorm.bias": torch.zeros(12)}))
    refused(tmp_path / "clip", "pre_layrnorm.bias.* not expected", load_vision)


def test_a_tied_head_that_differs(tmp_path):
    save_language(make(tied=True).language, None, tmp_path / "run")
    edit_tensors(tmp_path / "run", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_language(tmp_path / "run")
    edit_tensors(tmp_path / "run", lambda t: t["lm_head.weight"].add_(1))
    refused(tmp_path / "run", "tie_word_embeddings", load_language)


def test_layers_by_the_thousand_and_dtypes_that_cannot_compute(tmp_path):
    save(make(), tmp_path / "run")
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(Error, match="dtype is"):
            load(tmp_path / "run", dtype=dtype)
    edit_config(tmp_path / "run", num_hidden_layers=2000)
    refused(tmp_path / "run", "num_hidden_layers.*more than any model has")


def test_missing_and_broken_files(tmp_path):
    save(make(), tmp_path / "run")
    refused(tmp_path / "nothing", "no such folder")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "run", "0 bytes")
    (tmp_path / "run" / "model.safetensors").unlink()
    refused(tmp_path / "run", "no weights")
    (tmp_path / "run" / "config.json").write_text('{"model_type": ')
    refused(tmp_path / "run", "JSON")
    (tmp_path / "run" / "config.json").unlink()
    refused(tmp_path / "run", "no such file")


def test_a_tensor_in_two_shards(tmp_path):
    save_language(Llama(LlamaConfig(**LANGUAGE)), None, tmp_path / "run")
    tensors = load_file(tmp_path / "run/model.safetensors")
    (tmp_path / "run/model.safetensors").unlink()
    save_file(tensors, tmp_path / "run/a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / "run/b.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}}
    (tmp_path / "run/model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "run", r"1 \(model.norm.weight\) tensors are in two files", load_language)


def test_a_dtype_that_the_device_lacks_is_one_line(tmp_path, monkeypatch):
    """As MPS says it of float64; before a weight is read."""
    ones = torch.ones
    save(make(), tmp_path / "run")

    def lacking(*shape, device=None, dtype=None):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return ones(*shape, device=device, dtype=dtype)

    monkeypatch.setattr(torch, "ones", lacking)
    with pytest.raises(Error, match=r"dtype float64: device cpu lacks it \(Cannot .*\); choose another --dtype"):
        load(tmp_path / "run", dtype=torch.float64)
    assert load(tmp_path / "run", dtype=torch.float16).language.norm.weight.dtype == torch.float16


def test_a_dtype_that_weights_cannot_have_destroys_nothing(tmp_path):
    model = make()
    save(model, tmp_path / "run")
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(Error, match=r"such as torch\.bfloat16"):
            save(model, tmp_path / "run", dtype)
    assert_same(load(tmp_path / "run"), model)


def test_our_own_names_are_no_official_ones(tmp_path):
    save(make(), tmp_path / "run")
    edit_tensors(tmp_path / "run", lambda t: t.update({"projector.bias": t.pop("model.mm_projector.bias")}))
    refused(tmp_path / "run", r"1 \(model.mm_projector.bias\) missing; 1 \(projector.bias\) not expected")


def test_a_tokenizer_that_does_not_fit(tmp_path, tokenizer):
    save(make(tokenizer), tmp_path / "run")
    model = Llama(LlamaConfig(**LANGUAGE | {"vocab_size": 399}))
    save_language(model, tokenizer, tmp_path / "short")
    refused(tmp_path / "short", "400 tokens, but the embedding has 399 rows", load_language)
    check_tokenizer(tokenizer, 448)  # padded to a multiple of 64
    for rows in (401, 512):
        with pytest.raises(Error, match=f"{rows} rows"):
            check_tokenizer(tokenizer, rows)
    shutil.copy(tokenizer.file, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<im_start>": 400, "<im_end>": 401}')
    check_tokenizer(load_tokenizer(tmp_path), 402)


def test_tokens_that_were_added_are_saved_along(tmp_path, tokenizer):
    shutil.copy(tokenizer.file, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 400}')
    wide = LlamaConfig(**{**LANGUAGE, "vocab_size": 401})
    model = Llava(LlavaConfig(VISION, wide), load_tokenizer(tmp_path)).eval()
    save(model, tmp_path / "run")
    assert_same(load(tmp_path / "run"), model)


# ---------------------------------------------------------------- saving that fails


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, tokenizer, monkeypatch, error):
    model = make(tokenizer)
    save(model, tmp_path / "run")

    def full(*_, **__):
        raise error

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(Error, match=r"No space left.*intact"):
        save(make(projector_type="mlp2x_gelu"), tmp_path / "run")
    assert_same(load(tmp_path / "run"), model)
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_loading_finds_what_an_interrupted_save_completed(tmp_path, tokenizer):
    model = make(tokenizer)
    save(model, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / ".run.previous")
    assert_same(load(tmp_path / "run"), model)


def test_weights_that_cannot_be_read_again_are_not_saved(tmp_path):
    model = make()
    save(model, tmp_path / "run")
    worse = make()
    worse.projector.weight.data[0, 0] = 1e6
    with pytest.raises(Error, match=r"not saved, projector.weight holds NaN or infinity as torch.float16"):
        save(worse, tmp_path / "run", dtype=torch.float16)
    assert_same(load(tmp_path / "run"), model)
