"""What transformers saves is read here and gives the same numbers: every layout in which it writes a LLaVA."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollava.checkpoint import load
from nanollava.error import Error
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

TOLERANCE = 2e-5  # relative, float32: roundings of 1e-7 through a few blocks
# no two sizes alike, so that none can stand in for another; N = 9 patches
VISION = {"image_size": 24, "patch_size": 8, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 4,
          "num_attention_heads": 5}  # fmt: skip
TEXT = {"vocab_size": 70, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 99,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}  # fmt: skip
THEIR_IMAGE, N = 60, 9


@pytest.fixture(scope="module")
def theirs():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=THEIR_IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


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


WAYS = (as_built, as_read_again, as_in_memory, with_vision_model, in_shards)


@pytest.mark.parametrize("save", WAYS, ids=lambda way: way.__name__)
def test_logits_are_theirs_in_every_layout_that_transformers_writes(save, theirs, tmp_path):
    save(theirs, tmp_path / "llava")
    ours = load(tmp_path / "llava")
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    ids = [1, IMAGE, 5, 6, IMAGE, 7, 8]
    widened = [t for token in ids for t in ([THEIR_IMAGE] * N if token == IMAGE else [token])]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([widened]), pixel_values=pixels).logits
        found = ours(torch.tensor([ids]), pixels)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() / expected.abs().max() < TOLERANCE


def test_fields_that_a_config_leaves_out_are_those_of_its_classes(theirs, tmp_path):
    """Official configs list what differs from the defaults of LlamaConfig and CLIPVisionConfig."""
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
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
        ({"vision_feature_layer": [-2, -5]}, "mm_vision_select_layer"),
        ({"text_config": {"model_type": "mistral"}}, "text_config"),
        ({"text_config": 3}, "text_config"),
        ({"text_config": {"hidden_size": 30}}, "misshapen|another shape|multiple"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(changes, words, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Error, match=words):
        load(tmp_path)


def test_a_missing_tensor_is_called_as_the_folder_calls_it(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("language_model.model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Error, match=r"1 \(language_model\.model\.norm\.weight\) missing"):
        load(tmp_path)
