"""config.json in and out: every field comes back, and what cannot be understood or computed is named."""

import math
from pathlib import Path

import pytest
import torch

from nanollava.config import check_kind, from_llava_hf, language_config, llava_config, llava_fields, vision_config
from nanollava.error import Error
from nanollava.llama import LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.vit import VisionConfig

FILE = Path("somewhere/config.json")
CONFIG = LlavaConfig(
    VisionConfig(56, 7, 48, 100, 5, 3, 1e-4),
    LlamaConfig(400, 24, 40, 2, 6, 3, 8, 1e-5, 5000.0, 99, True),
    "mlp2x_gelu",
    -3,
    "pad",
    "llava_v0",
    77,
    "stage2",
    True,
)


def read(fields: dict) -> LlavaConfig:
    check_kind(fields, FILE, "llava", "llava_llama")
    return llava_config(fields, FILE, vision_config(fields["vision_config"], FILE))


def test_every_field_comes_back():
    assert read(llava_fields(CONFIG, torch.float16)) == CONFIG
    assert llava_fields(CONFIG, torch.float16)["torch_dtype"] == "float16"


def test_absent_fields_have_the_defaults_of_the_official_classes():
    assert vision_config({}, FILE) == VisionConfig(224, 32, 768, 3072, 12, 12, 1e-5)
    assert language_config({}, FILE) == LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-6, 10000.0, 2048, False)
    bare = llava_config({"mm_vision_select_layer": -2}, FILE, VisionConfig())
    assert (bare.projector_type, bare.image_aspect_ratio, bare.template) == ("linear", "crop", "vicuna_v1")
    assert (bare.select_layer, bare.max_length, bare.stage) == (-2, 2048, "")


def test_null_is_as_good_as_absent():
    bare = {"mm_vision_select_layer": -2}
    null = bare | dict.fromkeys(set(llava_fields(CONFIG, torch.float32)) - {"model_type", *bare})
    assert llava_config(null, FILE, VisionConfig()) == llava_config(bare, FILE, VisionConfig())


def test_rope_theta_in_either_place():
    new = {"rope_parameters": {"rope_theta": 7, "rope_type": "default"}}
    for fields in ({"rope_theta": 7}, new, {"rope_theta": 7, **new}):
        assert language_config(fields, FILE).rope_theta == 7


def test_a_llava_without_vision_config_has_the_tower_of_llava_15():
    read = from_llava_hf({"text_config": {}}, FILE)
    assert vision_config(read["vision_config"], FILE) == VisionConfig(336, 14, 1024, 4096, 24, 16)
    assert vision_config(from_llava_hf({"text_config": {}, "vision_config": {}}, FILE)["vision_config"], FILE) == (
        VisionConfig()
    )


PROBLEMS = [
    ({"model_type": None}, '"model_type" is missing'),
    ({"model_type": "llama"}, "expected llava or llava_llama"),
    ({"vision_config": "clip"}, "object with sizes"),
    ({"vision_config": {"hidden_act": "gelu"}}, "only 'quick_gelu'"),
    ({"vision_config": {"num_attention_heads": 7}}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
    ({"mm_vision_select_layer": None}, '"mm_vision_select_layer" is missing'),
    ({"mm_vision_select_layer": -9}, "has 5 layers"),
    ({"mm_vision_select_layer": "last"}, "has 5 layers"),
    ({"mm_vision_select_feature": "cls_patch"}, "only 'patch'"),
    ({"mm_use_im_start_end": 1}, "true or false"),
    ({"mm_projector_type": "resampler"}, "linear, mlp2x_gelu"),
    ({"mm_hidden_size": 7}, "48 wide"),
    ({"image_aspect_ratio": "anyres"}, "crop, square, pad"),
    ({"template": "chatml"}, "vicuna_v1"),
    ({"stage": "stage3"}, "stage1, stage2"),
    ({"hidden_size": "big"}, "positive number"),
    ({"hidden_size": True}, "positive number"),
    ({"hidden_size": 24.5}, "positive number"),
    ({"vocab_size": -5}, "positive number"),
    ({"rms_norm_eps": 0}, "positive number"),
    ({"rms_norm_eps": math.nan}, "positive number"),
    ({"rope_theta": math.inf}, "positive number"),
    ({"head_dim": 7}, "even"),
    ({"mm_vision_select_layer": -2.0}, "-2.0"),
    ({"tie_word_embeddings": "no"}, "true or false"),
    ({"tokenizer_model_max_length": 0}, "positive number"),
    ({"num_key_value_heads": 5}, "not a multiple"),
    ({"hidden_act": "gelu"}, "only 'silu'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "only 'default'"),
    ({"rope_parameters": {"rope_theta": 5000.0}, "rope_scaling": {"type": "dynamic"}}, "only 'default'"),
    ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta is 5000.0 and 7.0"),
    ({"mm_hidden_size": "48"}, "mm_hidden_size is '48'"),
    ({"mm_vision_select_layer": True}, "is True"),
    ({"vision_config": {"image_size": 2**24, "patch_size": 1}}, "more than any model"),
]


@pytest.mark.parametrize(("changes", "match"), PROBLEMS, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_in_one_line(changes, match):
    with pytest.raises(Error, match=match) as caught:
        read(llava_fields(CONFIG, torch.float32) | changes)
    assert str(caught.value).startswith(f"{FILE}: ") and "\n" not in str(caught.value)


def test_no_value_of_any_field_ends_in_a_traceback():
    for name in llava_fields(CONFIG, torch.float32) | {"rope_parameters": None, "rope_scaling": None}:
        for value in (None, "", "x", 0, -1, 3, 2.5, True, [], [1], {}, {"a": 1}, float("nan"), 10**12):
            try:
                read(llava_fields(CONFIG, torch.float32) | {name: value})
            except Error as error:
                assert "\n" not in str(error)
