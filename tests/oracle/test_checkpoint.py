"""What transformers saves is read here and gives the same numbers: CLIP, LLaMA, and every layout of a LLaVA. Sizes are
drawn at random with a fixed seed, no two of a part alike, so that none can stand in for another."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollava.checkpoint import load, load_language, load_vision, save_vision
from nanollava.error import Error
from nanollava.generate import Sampling, generate
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative, float32: roundings of 1e-7 through a few blocks
every_size = pytest.mark.parametrize("seed", range(4))


def sizes(seed: int) -> tuple[dict, dict]:
    """Of a tower and of a decoder. Heads are 6 to 12 wide in the one, 8 to 16 in the other; seed 3 has as many key
    heads as heads, as Vicuna."""
    for attempt in range(100):
        vision, text = draw_sizes(random.Random(seed + 1000 * attempt), seed == 3)
        numbers = list(vision.values()), [v for v in text.values() if type(v) is int]
        doubles = [len(part) - len(set(part)) for part in numbers]
        if doubles == [0, int(seed == 3)]:  # heads and key heads
            return vision, text | {"tie_word_embeddings": seed % 2 == 1}
    raise AssertionError("no sizes that differ")


def draw_sizes(rng: random.Random, vicuna: bool) -> tuple[dict, dict]:
    heads, key_heads = (7, 7) if vicuna else rng.choice(((4, 2), (6, 3), (9, 3), (5, 1)))
    patch, across = rng.choice(((4, 3), (6, 4), (7, 3), (8, 2)))
    tower_heads = rng.choice((2, 3, 5))
    vision = {
        "image_size": patch * across, "patch_size": patch, "hidden_size": tower_heads * rng.choice((6, 8, 12)),
        "num_attention_heads": tower_heads, "num_hidden_layers": rng.choice((3, 4)),
        "intermediate_size": rng.randrange(41, 60),
    }  # fmt: skip
    text = {
        "vocab_size": rng.randrange(70, 100), "hidden_size": heads * rng.choice((8, 10, 16)),
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "num_hidden_layers": rng.choice((2, 3)),
        "intermediate_size": rng.randrange(101, 140), "rms_norm_eps": rng.choice((1e-5, 1e-6)),
        "max_position_embeddings": 199,
        "rope_parameters": {"rope_theta": rng.choice((500.0, 10_000.0, 500_000.0)), "rope_type": "default"},
    }  # fmt: skip
    return vision, text


def drawn(model):
    """Random weights, the norms' too: at 1 they would prove nothing."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def noise(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- CLIP and LLaMA


@every_size
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "tower"])
@pytest.mark.parametrize("bin", [True, False], ids=["bin", "safetensors"])
def test_features_of_a_clip_that_transformers_saved(seed, whole, bin, tmp_path):
    vision, _ = sizes(seed)
    if whole:
        text = {"vocab_size": 31, "hidden_size": 20, "intermediate_size": 22, "num_attention_heads": 2}
        config = transformers.CLIPConfig(vision_config=vision, text_config=text | {"num_hidden_layers": 1})
        theirs = drawn(transformers.CLIPModel(config))
        tower = theirs.vision_model
    else:
        theirs = tower = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)))
    theirs.save_pretrained(tmp_path)
    if bin:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    pixels = noise(2, vision["image_size"])
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        ours = load_vision(tmp_path)
        for layer in (-1, -2, -3):
            assert error(ours(pixels, layer), states[layer][:, 1:]) < TOLERANCE


@every_size
@pytest.mark.parametrize("old", [True, False], ids=["rope_theta", "rope_parameters"])
def test_logits_and_words_of_a_llama_that_transformers_saved(seed, old, tmp_path):
    _, text = sizes(seed)
    theirs = drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    if old:
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours, ids = load_language(tmp_path), torch.tensor([[1, 5, 44, 7, 33]])
    with torch.no_grad():
        assert error(ours(ids), theirs(ids).logits) < TOLERANCE
        expected = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        for _ in range(6):
            ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, expected)


# ---------------------------------------------------------------- LLaVA

THEIR_IMAGE = 60


@pytest.fixture(scope="module", params=range(4))
def theirs(request):
    vision, text = sizes(request.param)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
        image_token_index=THEIR_IMAGE, tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    return drawn(transformers.LlavaForConditionalGeneration(config))


def as_built(theirs, folder: Path) -> None:
    theirs.save_pretrained(folder)


def as_read_again(theirs, folder: Path) -> None:
    """llava-hf's layout, and what is saved of a model that was loaded from it."""
    with_vision_model(theirs, folder.parent / "first")
    transformers.LlavaForConditionalGeneration.from_pretrained(folder.parent / "first").save_pretrained(folder)


def as_in_memory(theirs, folder: Path) -> None:
    theirs.save_pretrained(folder, save_original_format=False)


def with_vision_model(theirs, folder: Path) -> None:
    """llava-hf's own names: `vision_tower.vision_model.` and `language_model.model.`"""
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(theirs, folder: Path) -> None:
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def as_the_authors(theirs, folder: Path) -> None:
    """The official layout of v1.5: LLaMA's names and mm_projector, in a .bin, the tower in a folder beside it."""
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            tensors["model." + name.removeprefix("language_model.")] = tensor
        elif name.startswith("multi_modal_projector."):
            linear, part = name.removeprefix("multi_modal_projector.linear_").split(".")
            tensors[f"model.mm_projector.{2 * int(linear) - 2}.{part}"] = tensor
        elif name == "lm_head.weight":
            tensors[name] = tensor
    theirs.save_pretrained(folder.parent / "whole")
    save_vision(load(folder.parent / "whole").vision, folder.parent / "clip-vit-tiny")
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    vision, text = theirs.config.vision_config, theirs.config.text_config.to_dict()
    config = {
        **text, "model_type": "llava", "rope_theta": text["rope_parameters"]["rope_theta"], "rope_parameters": None,
        "mm_vision_tower": "somebody/clip-vit-tiny", "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


WAYS = (as_built, as_read_again, as_in_memory, with_vision_model, in_shards, as_the_authors)


@pytest.mark.parametrize("save", WAYS, ids=lambda way: way.__name__)
def test_features_logits_and_words_are_theirs_in_every_layout(save, theirs, tmp_path):
    save(theirs, tmp_path / "llava")
    ours = load(tmp_path / "llava")
    pixels, N = noise(2, ours.config.vision.image_size), ours.config.vision.num_patches
    ids = [1, IMAGE, 5, 6, IMAGE, 7, 8]
    widened = torch.tensor([[t for token in ids for t in ([THEIR_IMAGE] * N if token == IMAGE else [token])]])
    with torch.no_grad():
        features = torch.stack(list(theirs.get_image_features(pixels).pooler_output))
        assert error(ours.image_tokens(pixels), features) < TOLERANCE
        expected = theirs(input_ids=widened, pixel_values=pixels).logits
        assert error(ours(torch.tensor([ids]), pixels), expected) < TOLERANCE
        words = theirs.generate(
            input_ids=widened, pixel_values=pixels, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, widened.shape[1] :].tolist()
    (found,) = generate(ours, [ids], pixels, Sampling(max_new_tokens=6), "vicuna_v1")
    assert found.ids == [*words, 2][: [*words, 2].index(2)]


@pytest.mark.parametrize(("above", "inside"), [(True, False), (False, True), (True, True)])
def test_a_head_is_tied_where_either_level_of_the_config_says_so(above, inside, tmp_path):
    vision, text = sizes(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=THEIR_IMAGE, tie_word_embeddings=above,
        text_config=transformers.LlamaConfig(**text | {"tie_word_embeddings": inside}),
    )  # fmt: skip
    theirs = drawn(transformers.LlavaForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert error(load(tmp_path)(ids), theirs(input_ids=ids).logits) < TOLERANCE


def test_the_padded_vocabulary_of_llava_hf_is_cut_to_its_tokenizer(tmp_path, tiny_tokenizer_file):
    """As in the official downloads: <image> right behind the pieces, rows up to a multiple of 64, no word of how many
    there were."""
    vision, text = sizes(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=400,
        text_config=transformers.LlamaConfig(**text | {"vocab_size": 448}),
    )  # fmt: skip
    theirs = drawn(transformers.LlavaForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path)
    shutil.copy(tiny_tokenizer_file, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<image>": 400, "<pad>": 401}')
    ours, ids = load(tmp_path), torch.tensor([[1, 5, 6, 7]])
    assert (ours.config.language.vocab_size, ours.tokenizer.added) == (400, {})
    with torch.no_grad():
        assert error(ours(ids), theirs(input_ids=ids).logits[..., :400]) < TOLERANCE


def test_padding_and_positions_come_from_the_files_of_llava_hf(tmp_path):
    small(tmp_path)
    assert load(tmp_path).config.max_length == 199  # transformers cuts nothing
    for pads, aspect in ((True, "pad"), (False, "crop"), (None, "crop")):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_pad": pads}))
        assert load(tmp_path).config.image_aspect_ratio == aspect


def test_more_rows_before_the_image_than_there_are(tmp_path):
    config = small(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rows_before_image": 5000}))
    with pytest.raises(Error, match="rows_before_image is 5000"):
        load(tmp_path)


def small(folder: Path):
    """A LLaVA that transformers saved, to be damaged."""
    vision, text = sizes(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
        image_token_index=THEIR_IMAGE,
    )  # fmt: skip
    drawn(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_fields_that_a_config_leaves_out_are_those_of_its_classes(tmp_path):
    """Official configs list what differs from the defaults of LlamaConfig and CLIPVisionConfig."""
    config = small(tmp_path)
    for name in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        config.pop(name, None)
    config["vision_config"].pop("layer_norm_eps")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert (model.config.select_layer, model.config.vision.layer_norm_eps) == (-2, 1e-5)
    assert (model.config.template, model.config.image_aspect_ratio) == ("vicuna_v1", "crop")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"image_token_index": "a"}, "image_token_index"),
        ({"text_config": {"model_type": "mistral"}}, "text_config"),
        ({"text_config": 3}, "text_config"),
        ({"text_config": {"hidden_size": 30}}, "misshapen|another shape|multiple"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(changes, words, tmp_path):
    config = small(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Error, match=words):
        load(tmp_path)


def test_a_missing_tensor_is_called_as_the_folder_calls_it(tmp_path):
    small(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("language_model.model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Error, match=r"1 \(language_model\.model\.norm\.weight\) missing"):
        load(tmp_path)
