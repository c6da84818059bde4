"""What official runs leave that is no whole v1.5 model: v0 and v1 with tokens around their images, deltas, a projector
alone, LoRA adapters. Each is made here by hand from a whole model, and must give that model back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nanollava import convert
from nanollava.checkpoint import load, load_language, save, save_language, save_vision
from nanollava.conversation import IGNORE, encode
from nanollava.error import Error
from nanollava.folder import tensors, weight_files
from nanollava.generate import Sampling, generate
from nanollava.images import preprocess
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE
from nanollava.tokenizer import Tokenizer, load_tokenizer
from nanollava.vit import VisionConfig

VISION = VisionConfig(24, 8, 30, 44, 4, 5)
LANGUAGE = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
TALK = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A star."}]


def randomly(model: torch.nn.Module) -> torch.nn.Module:
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def make(tokenizer: Tokenizer | None, vocab_size: int = 400, **settings) -> Llava:
    torch.manual_seed(0)
    return randomly(Llava(LlavaConfig(VISION, LlamaConfig(vocab_size, **LANGUAGE), **settings), tokenizer))


def edit(file: Path, **fields) -> None:
    """Set fields of a JSON file; None removes one."""
    content = {k: v for k, v in (json.loads(file.read_text()) | fields).items() if v is not None}
    file.write_text(json.dumps(content))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(folder: Path, *words: str, **options) -> None:
    with pytest.raises(Error) as caught:
        load(folder, **options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


# ---------------------------------------------------------------- v0 and v1


ADDED = {"v1": {"<im_patch>": 400, "<im_start>": 401, "<im_end>": 402}}
ADDED["v0"] = ADDED["v1"] | {"[PAD]": 403}


def as_published(folder: Path, tokenizer: Tokenizer, added: dict[str, int]) -> Llava:
    """A folder as v0 and v1 were published: one linear projector, the tower elsewhere, a config without a template."""
    model = make(tokenizer, 400 + len(added))
    save(model, folder)
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "vision_tower" not in k}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    save_vision(model.vision, folder.parent / "clip-vit")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    absent = ("template", "stage", "vision_config", "mm_projector_type", "image_aspect_ratio", "rope_theta", "head_dim")
    edit(folder / "config.json", model_type="llava", mm_use_im_start_end=True, mm_vision_tower="openai/clip-vit",
         bos_token_id=0, eos_token_id=1, **dict.fromkeys(absent))  # fmt: skip
    return model


@pytest.mark.parametrize(("version", "template"), [("v0", "llava_v0"), ("v1", "llava_v1")])
def test_the_first_releases_are_read_and_know_their_template(version, template, tiny_tokenizer_file, tmp_path):
    model = as_published(tmp_path / "llava", Tokenizer(tiny_tokenizer_file), ADDED[version])
    for folder in (tmp_path / "llava", tmp_path / "again"):
        loaded = load(folder)
        assert same(loaded, model)
        config = loaded.config
        assert (config.template, config.projector_type, config.image_aspect_ratio) == (template, "linear", "crop")
        assert config.use_im_start_end and loaded.tokenizer.image_ids == [401, IMAGE, 402]
        if not (tmp_path / "again").exists():
            save(loaded, tmp_path / "again")


def test_an_image_stands_between_its_two_tokens(tiny_tokenizer_file, tmp_path):
    plain = Tokenizer(tiny_tokenizer_file)
    as_published(tmp_path / "llava", plain, ADDED["v1"])
    tokenizer = load_tokenizer(tmp_path / "llava")
    assert tokenizer.image_ids == load(tmp_path / "llava").tokenizer.image_ids
    ids, labels = encode(TALK, tokenizer, "llava_v1")
    expected, expected_labels = encode(TALK, plain, "llava_v1")
    place = expected.index(IMAGE)
    assert ids == [*expected[:place], 401, IMAGE, 402, *expected[place + 1 :]]
    assert labels == [*expected_labels[:place], *[IGNORE] * 3, *expected_labels[place + 1 :]]
    told, _ = encode([{"role": "user", "content": "<im_start> <im_end>"}], tokenizer, "llava_v1")
    assert max(told) < 400  # written in a text they are text
    assert tokenizer.decode([401, 402]) == ""


def test_answers_of_the_first_releases_end_to_end(tiny_tokenizer_file, tmp_path):
    as_published(tmp_path / "llava", Tokenizer(tiny_tokenizer_file), ADDED["v0"])
    model, picture = load(tmp_path / "llava"), Image.effect_noise((30, 20), 99).convert("RGB")
    ids, _ = encode([{"role": "user", "content": "<image>\nWhat?"}], model.tokenizer, "llava_v0")
    assert ids[ids.index(401) : ids.index(402) + 1] == [401, IMAGE, 402]
    (expected,) = generate(model, [ids], preprocess(picture, 24, "crop")[None], Sampling(max_new_tokens=5), "llava_v0")
    assert len(expected.ids) == 5 and model.answer(picture, "What?", max_new_tokens=5) == expected.text


def test_without_the_ids_of_those_tokens_nothing_is_guessed(tiny_tokenizer_file, tmp_path, capsys):
    as_published(tmp_path / "llava", Tokenizer(tiny_tokenizer_file), ADDED["v1"])
    (tmp_path / "llava/added_tokens.json").write_text('{"<im_patch>": 400, "<im_start>": 401, "x": 402}')
    refused(tmp_path / "llava", "added_tokens.json", "<im_end> missing", "mm_use_im_start_end")
    (tmp_path / "llava/added_tokens.json").write_text('{"<im_start>": 5, "<im_end>": 402}')  # 5 is a word's
    refused(tmp_path / "llava", "added_tokens.json", "<im_start> missing")
    (tmp_path / "llava/added_tokens.json").write_text('{"<im_patch>": 400, "<im_start>": 402, "<im_end>": 402}')
    refused(tmp_path / "llava", "added_tokens.json", "have the same id")
    (tmp_path / "llava/added_tokens.json").write_text('{"<im_patch>": "400"}')
    refused(tmp_path / "llava", "added_tokens.json", "ids")
    (tmp_path / "llava/added_tokens.json").write_text(json.dumps(ADDED["v1"]))
    assert convert.main(["export", "--as", "llava-hf", str(tmp_path / "llava"), str(tmp_path / "out")]) == 2
    assert "linear" in capsys.readouterr().err and not (tmp_path / "out").exists()
    save(make(None, 403, projector_type="mlp2x_gelu", use_im_start_end=True), tmp_path / "mlp")
    assert convert.main(["export", "--as", "llava-hf", str(tmp_path / "mlp"), str(tmp_path / "out")]) == 2
    assert "<im_start>" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- deltas


@pytest.fixture
def delta(tiny_tokenizer_file, tmp_path) -> tuple[Llava, Path, Path]:
    """A model of v1.1, the base it was made from, and the delta as published: two .bin shards of float16."""
    model = as_published(tmp_path / "llava", Tokenizer(tiny_tokenizer_file), ADDED["v1"])
    base = randomly(Llama(LlamaConfig(400, **LANGUAGE))).half()
    save_language(base, Tokenizer(tiny_tokenizer_file), tmp_path / "base")
    known = load_file(tmp_path / "base/model.safetensors")
    folder = shutil.copytree(tmp_path / "llava", tmp_path / "delta")
    target = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    differences = {}
    for name, tensor in target.items():
        value = tensor.clone()
        if name in known:
            value[: len(known[name])] -= known[name].float()
        differences[name] = value.half()
    differences["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    index, names = {}, sorted(differences)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: differences[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return model, tmp_path / "base", folder


def test_base_and_delta_make_the_model(delta, tmp_path):
    model, base, folder = delta
    assert convert.main(["apply-delta", str(base), str(folder), str(tmp_path / "sum")]) == 0
    loaded = load(tmp_path / "sum")
    assert loaded.config.template == "llava_v1" and loaded.tokenizer.image_ids == [401, IMAGE, 402]
    for name, expected in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert (found - expected).abs().max() < 3e-3 * expected.abs().max(), name  # two roundings to float16
    stored = {name: value for file in weight_files(tmp_path / "sum") for name, value in tensors(file)}
    halves = {k: v for file in weight_files(folder) for k, v in tensors(file)}
    assert torch.equal(stored["model.mm_projector.weight"], halves["model.mm_projector.weight"])
    assert torch.equal(stored["lm_head.weight"][400:], halves["lm_head.weight"][400:])
    both = halves["model.norm.weight"] + load_file(base / "model.safetensors")["model.norm.weight"]
    assert torch.equal(stored["model.norm.weight"], both) and both.dtype == torch.float16


def test_a_delta_of_another_base_is_refused_and_leaves_nothing(delta, tmp_path, capsys):
    _, base, folder = delta
    for changes in (
        {"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"hidden_size": 60}, {"vocab_size": 500},
        {"num_key_value_heads": 1},
    ):  # fmt: skip
        other = Llama(LlamaConfig(**{"vocab_size": 400, **LANGUAGE, **changes}))
        save_language(other, None, tmp_path / "other")
        assert convert.main(["apply-delta", str(tmp_path / "other"), str(folder), str(tmp_path / "sum")]) == 2
        line = capsys.readouterr().err
        assert "not the base of" in line and len(line.splitlines()) == 1 and not (tmp_path / "sum").exists()
    assert convert.main(["apply-delta", str(folder), str(folder / "../delta"), str(tmp_path / "sum")]) == 2
    assert "as base and as delta" in capsys.readouterr().err
    assert convert.main(["apply-delta", str(folder), str(base), str(tmp_path / "sum")]) == 2
    assert "expected llama" in capsys.readouterr().err
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.full((48,), torch.nan)}, base / "model.safetensors")
    assert convert.main(["apply-delta", str(base), str(folder), str(tmp_path / "sum")]) == 2
    assert "model.norm.weight is NaN" in capsys.readouterr().err
    save_file(weights, base / "model.safetensors")
    shard = next(file for file in weight_files(folder) if "model.norm.weight" in torch.load(file))
    differences = torch.load(shard)
    torch.save(differences | {"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}, shard)
    assert convert.main(["apply-delta", str(base), str(folder), str(tmp_path / "sum")]) == 2
    assert "model.norm.weight is NaN, infinite or no floats" in capsys.readouterr().err
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"cut")
    assert convert.main(["apply-delta", str(base), str(folder), str(tmp_path / "sum")]) == 2
    assert "00002-of-00002.bin: damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*sum*"))


# ---------------------------------------------------------------- over a base


def over_base(folder: Path, tokenizer: Tokenizer, kind: str) -> Llava:
    """``folder`` as official training leaves it, with clip-vit/ and vicuna/ beside it; and what it must load as."""
    model = make(tokenizer, projector_type=kind, image_aspect_ratio="pad")
    save(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    save_vision(model.vision, folder.parent / "clip-vit")
    save_language(model.language, tokenizer, folder.parent / "vicuna")
    edit(folder / "config.json", model_type="llava", mm_vision_tower="openai/clip-vit", vision_config=None,
         template=None, stage=None, _name_or_path="lmsys/vicuna")  # fmt: skip
    return model


def projector_of(model: Llava, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in model.projector.state_dict().items()}


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
def test_a_projector_alone_over_its_base(kind, prefix, tiny_tokenizer_file, tmp_path):
    model = over_base(tmp_path / "run", Tokenizer(tiny_tokenizer_file), kind)
    torch.save(projector_of(model, prefix), tmp_path / "run/mm_projector.bin")
    loaded = load(tmp_path / "run")
    assert same(loaded, model) and loaded.tokenizer.vocab_size == 400
    config = loaded.config
    assert (config.stage, config.template, config.image_aspect_ratio) == ("stage1", "plain", "pad")
    (tmp_path / "vicuna").rename(tmp_path / "elsewhere")
    assert same(load(tmp_path / "run", base=tmp_path / "elsewhere"), model)
    refused(tmp_path / "run", "lmsys/vicuna", "--base", "hf download lmsys/vicuna")


@pytest.mark.parametrize("patch", [0, 1])
@pytest.mark.parametrize("whole", [True, False])
def test_a_projector_that_brings_the_embedding_of_im_start_and_im_end(patch, whole, tiny_tokenizer_file, tmp_path):
    """As the first releases' stage 1 left it; with the row of <im_patch>, where that was added, nothing is done."""
    tokenizer, size = Tokenizer(tiny_tokenizer_file), 402 + patch
    model = over_base(tmp_path / "run", tokenizer, "linear")
    start_end = torch.randn(2, 48)
    matrix = torch.cat([torch.zeros(400 + patch, 48), start_end]) if whole else start_end
    stored = projector_of(model, "model.mm_projector.") | {"model.embed_tokens.weight": matrix}
    torch.save(stored, tmp_path / "run/mm_projector.bin")
    edit(tmp_path / "run/config.json", mm_use_im_start_end=True, vocab_size=size)
    for folder in (tmp_path / "run", tmp_path / "again"):
        loaded = load(folder)
        embedding, head = loaded.language.embed_tokens.weight, loaded.language.lm_head.weight
        assert torch.equal(embedding[:400], model.language.embed_tokens.weight)
        assert torch.equal(embedding[-2:], start_end)
        assert torch.equal(head[:400], model.language.lm_head.weight)
        assert torch.allclose(head[400:], model.language.lm_head.weight.mean(0).expand(2 + patch, -1), atol=1e-6)
        assert loaded.tokenizer.image_ids == [size - 2, IMAGE, size - 1]
        if not (tmp_path / "again").exists():
            save(loaded, tmp_path / "again")
    edit(tmp_path / "run/config.json", vocab_size=400)  # the base would have had these tokens already
    if not whole:
        refused(tmp_path / "run", "vicuna: vocab_size is 400, but", "run was trained over one with 398 or 397")


def test_the_folder_s_own_tokenizer_comes_before_the_base_s(tiny_tokenizer_file, tmp_path):
    model = over_base(tmp_path / "run", Tokenizer(tiny_tokenizer_file), "linear")
    torch.save(projector_of(model, "model.mm_projector."), tmp_path / "run/mm_projector.bin")
    shutil.copy(tiny_tokenizer_file, tmp_path / "run/tokenizer.model")
    (tmp_path / "run/tokenizer_config.json").write_text('{"legacy": false}')
    loaded = load(tmp_path / "run").tokenizer
    assert (loaded.file, loaded.legacy) == (tmp_path / "run/tokenizer.model", False)


def test_a_whole_model_refuses_a_base(tiny_tokenizer_file, tmp_path):
    save(make(Tokenizer(tiny_tokenizer_file)), tmp_path / "whole")
    torch.save({}, tmp_path / "whole/mm_projector.bin")  # official v1.5 folders have both
    load(tmp_path / "whole")
    refused(tmp_path / "whole", "whole model", base=tmp_path)


def test_a_projector_that_does_not_fit(tiny_tokenizer_file, tmp_path):
    model = over_base(tmp_path / "run", Tokenizer(tiny_tokenizer_file), "mlp2x_gelu")
    file = tmp_path / "run/mm_projector.bin"
    whole = projector_of(model, "model.mm_projector.")
    torch.save({k: v for k, v in whole.items() if "2.bias" not in k}, file)
    refused(tmp_path / "run", "mm_projector.bin", "1 (model.mm_projector.2.bias) missing")
    torch.save(whole | {"model.embed_tokens.weight": torch.ones(2, 48)}, file)  # without mm_use_im_start_end
    refused(tmp_path / "run", "mm_projector.bin", "model.embed_tokens.weight", "not expected")
    edit(tmp_path / "run/config.json", mm_use_im_start_end=True, vocab_size=402)
    half_byte = torch.ones(2, 48).to(torch.float8_e4m3fn)
    for wrong in (torch.ones(2, 47), torch.full((2, 48), torch.nan), half_byte):
        torch.save(whole | {"model.embed_tokens.weight": wrong}, file)
        refused(tmp_path / "run", "2 rows of 48 finite numbers")
    for wrong in (torch.ones(()), torch.ones(1, 48), torch.ones(7, 48)):
        torch.save(whole | {"model.embed_tokens.weight": wrong}, file)
        refused(tmp_path / "run", "expected 2 rows or 402")
    edit(tmp_path / "run/config.json", vocab_size=405)
    torch.save(whole | {"model.embed_tokens.weight": torch.ones(2, 48)}, file)
    refused(tmp_path / "run", "vocab_size is 400", "with 403 or 402")
    edit(tmp_path / "run/config.json", vocab_size=400)
    torch.save(whole, file)
    refused(tmp_path / "run", "added_tokens.json", "<im_start> and <im_end> missing")
    edit(tmp_path / "run/config.json", mm_use_im_start_end=None)
    torch.save(whole | {"model.mm_projector.0.weight": torch.ones(48, 31)}, file)
    refused(tmp_path / "run", "(48, 31) for (48, 30)")
    torch.save(whole | {"model.mm_projector.0.bias": torch.full((48,), torch.nan)}, file)
    refused(tmp_path / "run", "NaN")
    torch.save(whole, file)
    save_language(Llama(LlamaConfig(400, **LANGUAGE | {"hidden_size": 60})), None, tmp_path / "wide")
    refused(tmp_path / "run", "hidden_size is 60", "with 48", base=tmp_path / "wide")
    save_language(Llama(LlamaConfig(400, **LANGUAGE | {"rms_norm_eps": 1e-6})), None, tmp_path / "old")
    refused(tmp_path / "run", "rms_norm_eps is 1e-06", "with 1e-05", base=tmp_path / "old")


RANK, ALPHA = 3, 5
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def lora_run(tiny_tokenizer_file, tmp_path) -> tuple[Llava, Path, dict[str, torch.Tensor]]:
    """A LoRA run as official training leaves it, its whole model before adapting, and its adapters."""
    folder = tmp_path / "run"
    model = over_base(folder, Tokenizer(tiny_tokenizer_file), "mlp2x_gelu")
    torch.manual_seed(1)
    adapters = {}
    for layer in range(3):
        for target in ADAPTED:
            out, inner = model.language.get_parameter(f"layers.{layer}.{target}.weight").shape
            name = f"base_model.model.model.layers.{layer}.{target}"
            adapters[f"{name}.lora_A.weight"] = torch.randn(RANK, inner)
            adapters[f"{name}.lora_B.weight"] = torch.randn(out, RANK)
    save_file(adapters, folder / "adapter_model.safetensors")
    torch.save(projector_of(model, "base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin")
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
        "lora_dropout": 0.05, "task_type": "CAUSAL_LM", "target_modules": list(ADAPTED), "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return model, folder, adapters


def side_branches(language: Llama, adapters: dict[str, torch.Tensor]) -> None:
    """The network that LoRA trains: next to each adapted layer x -> x A^T B^T alpha / r, nothing merged."""
    for name in (name for name in adapters if "lora_A" in name):
        a, b = adapters[name], adapters[name.replace("lora_A", "lora_B")]
        layer = language.get_submodule(name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight"))
        layer.register_forward_hook(lambda _, x, y, a=a, b=b: y + (x[0] @ a.T) @ b.T * ALPHA / RANK)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_lora_merged_equals_its_side_branches(ending, lora_run, tmp_path):
    model, folder, adapters = lora_run
    if ending == "bin":
        (folder / "adapter_model.safetensors").unlink()
        torch.save(
            {k.replace(".weight", ".default.weight"): v for k, v in adapters.items()}, folder / "adapter_model.bin"
        )
    loaded = load(folder)
    assert loaded.config.template == "vicuna_v1" and same(loaded.projector, model.projector)
    side_branches(model.language, adapters)
    ids, pixels = torch.tensor([[1, 7, IMAGE, 9, 30]]), torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected, found = model(ids, pixels), loaded(ids, pixels)
    assert (found - expected).abs().max() / expected.abs().max() < 2e-5
    before = load_language(tmp_path / "vicuna")(ids.clamp(min=0))
    assert (found[:, 0] - before[:, 0]).abs().max() / before.abs().max() > 0.01


def test_lora_over_a_first_release_keeps_its_template(lora_run, tiny_tokenizer_file, tmp_path):
    _, folder, _ = lora_run
    as_published(tmp_path / "v0" / "base", Tokenizer(tiny_tokenizer_file), ADDED["v0"])
    edit(folder / "config.json", mm_use_im_start_end=True, vocab_size=404)
    torch.save(projector_of(make(None), "model.mm_projector."), folder / "non_lora_trainables.bin")
    edit(folder / "config.json", mm_projector_type="linear")
    loaded = load(folder, base=tmp_path / "v0" / "base")
    assert (loaded.config.template, loaded.tokenizer.image_ids) == ("llava_v0", [401, IMAGE, 402])


@pytest.mark.parametrize("kind", ["llava", "llava-hf"])
def test_lora_over_a_llava(kind, lora_run, tmp_path):
    """As the official scripts train on a task: the base is itself a LLaVA; its tower serves, its projector does not."""
    _, folder, _ = lora_run
    expected = load(folder)
    start = load(folder)
    start.language.load_state_dict(load_language(tmp_path / "vicuna").state_dict())
    randomly(start.projector)
    save(start, tmp_path / "start")
    convert.export(tmp_path / "start", tmp_path / "base", kind)
    shutil.rmtree(tmp_path / "clip-vit")
    loaded = load(folder, base=tmp_path / "base")
    assert same(loaded, expected) and loaded.config == expected.config


def test_lora_over_a_llava_takes_the_tower_that_the_run_names(lora_run, tiny_tokenizer_file, tmp_path):
    model, folder, _ = lora_run
    other = make(Tokenizer(tiny_tokenizer_file), projector_type="mlp2x_gelu")
    randomly(other.vision)
    save(other, tmp_path / "base")
    assert same(load(folder, base=tmp_path / "base").vision, other.vision)  # the base names none
    edit(tmp_path / "base/config.json", mm_vision_tower="openai/clip-small")
    for vision in (None, tmp_path / "clip-vit"):
        assert same(load(folder, base=tmp_path / "base", vision=vision).vision, model.vision)


def test_adapters_that_belong_to_nothing_are_not_passed_over(lora_run, tmp_path):
    _, folder, _ = lora_run
    (folder / "adapter_config.json").rename(tmp_path / "vicuna/adapter_config.json")
    refused(folder, "adapter_config.json", "no such file beside the adapters")
    with pytest.raises(Error, match="adapters beside whole weights"):
        load_language(tmp_path / "vicuna")
    (tmp_path / "vicuna/adapter_config.json").rename(folder / "adapter_config.json")
    save_file({}, folder / "model.safetensors")
    refused(folder, "adapters beside whole weights")


def test_lora_becomes_a_whole_folder(lora_run, tmp_path):
    _, folder, _ = lora_run
    assert convert.main(["export", "--as", "llava", str(folder), str(tmp_path / "whole")]) == 0
    assert same(load(tmp_path / "whole"), load(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ("use_dora", "not supported")),
        ({"bias": "all"}, ("bias", "not supported")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights", "not supported")),
        ({"rank_pattern": {"q_proj": 8}}, ("rank_pattern", "not supported")),
        ({"lora_bias": True}, ("lora_bias", "not supported")),
        ({"use_qalora": True}, ("use_qalora", "not supported")),
        ({"target_parameters": ["mlp.up_proj.weight"]}, ("target_parameters", "not supported")),
        ({"trainable_token_indices": [1]}, ("trainable_token_indices", "not supported")),
        ({"target_modules": [*ADAPTED, "k_proj"]}, ("3 (layers.0.self_attn.k_proj.weight", "target_modules")),
        (
            {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
            ("3 (layers.0.mlp.up_proj.weight", "promise"),
        ),
        ({"target_modules": "all-linear"}, ("12 (layers.0.self_attn.k_proj.weight", "promise")),
        ({"r": 4}, ("9 (", "do not fit")),
        ({"r": None}, ('"r" is None',)),
        ({"r": 0}, ('"r" is 0',)),
        ({"r": True}, ('"r" is True',)),
        ({"lora_alpha": "16"}, ("\"lora_alpha\" '16'",)),
        ({"lora_alpha": float("nan")}, ('"lora_alpha" nan',)),
        ({"lora_alpha": 10**400}, ("below a million",)),
        ({"base_model_name_or_path": ".."}, ('a base, ".."', "--base")),
        ({"base_model_name_or_path": "a/\0"}, ("--base",)),
        ({"base_model_name_or_path": 7}, ('a base, "7"', "--base")),
        ({"base_model_name_or_path": "lmsys/gone"}, ("lmsys/gone", "--base")),
    ],
)
def test_lora_settings_that_would_change_the_sum_are_refused(changes, words, lora_run):
    _, folder, _ = lora_run
    edit(folder / "adapter_config.json", **changes)
    refused(folder, *words)


def test_adapters_that_do_not_fit(lora_run):
    _, folder, adapters = lora_run
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def stored(changes: dict, without: str = "") -> None:
        kept = {k: v for k, v in (adapters | changes).items() if k != without}
        save_file(kept, folder / "adapter_model.safetensors")

    stored({first: torch.full((RANK, 48), torch.inf)})
    refused(folder, "1 (layers.0.self_attn.q_proj.weight)", "not finite")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        stored({first: torch.ones(RANK, 48).to(dtype)})
        refused(folder, "1 (layers.0.self_attn.q_proj.weight)", "not finite")
    stored({first: torch.full((RANK, 48), 1e38)})
    refused(folder, "layers.0.self_attn.q_proj.weight too large for torch.float32")
    stored({first.replace(".weight", ".default.weight"): adapters[first].clone()})
    refused(folder, "layers.0.self_attn.q_proj.weight has two adapters A")
    stored({first: torch.ones(RANK, 47)})
    refused(folder, "1 (layers.0.self_attn.q_proj.weight)")
    stored({}, without=first)
    refused(folder, "1 (layers.0.self_attn.q_proj.weight)")
    stored({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(RANK, 48)})
    refused(folder, "layers.9")
    save_file({}, folder / "adapter_model.safetensors")
    refused(folder, "no adapters")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "no adapter_model.safetensors")
    save_file(adapters, folder / "adapter_model.safetensors")
    (folder / "non_lora_trainables.bin").unlink()
    refused(folder, "non_lora_trainables.bin", "no such file")
