"""config.json, as the official classes write it, to and from the dataclasses that the modules take.

Our own folders use the official field names. A field that is absent has the default of the class that wrote the file; a
value that would change what the network computes, and is not implemented here, is refused by name.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanollava.conversation import TEMPLATES
from nanollava.error import Error
from nanollava.llama import LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.vit import VisionConfig

Config = TypeVar("Config", VisionConfig, LlamaConfig)
LARGEST = 2**24  # no number of positions of any model is larger
LIMITS = {"num_hidden_layers": 1000, "max_position_embeddings": LARGEST, "tokenizer_model_max_length": LARGEST}
WIDEST = 2**20  # no other size; and no product of three of them, a matrix of bytes, is more than a computer counts
# what LlavaConfig of transformers takes where a config has no vision_config at all: CLIP ViT-L/14 at 336 pixels
TOWER = {
    "image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}  # fmt: skip
OURS = ("image_aspect_ratio", "tokenizer_model_max_length", "template", "stage")  # what llava-hf has no field for


# ---------------------------------------------------------------- in


def check_kind(config: dict, file: Path, *kinds: str) -> None:
    """Raises Error where the model_type of a config is none of those that a loader reads."""
    kind = required(config, file, "model_type")
    if kind not in kinds:
        raise Error(f'{file}: model_type is "{kind}", expected {" or ".join(kinds)}; give another folder')


def required(config: dict, file: Path, name: str) -> Any:
    """A field for which there is no default."""
    if config.get(name) is None:
        raise Error(f'{file}: the field "{name}" is missing and has no default; add it')
    return config[name]


def from_llava_hf(config: dict, file: Path) -> dict:
    """The config of LlavaForConditionalGeneration (text_config and vision_config) in the official field names, and
    those of ours that `llava_hf_fields` adds. Without these such models know v1.5's template, and cut nothing that
    their positions reach.
    """
    text = config["text_config"]
    if not isinstance(text, dict) or text.get("model_type") not in (None, "llama"):
        raise Error(f"{file}: text_config is not that of a LLaMA; only those are supported")
    _supported(config, file, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    _supported(config, file, multimodal_projector_bias=True)
    layer = -2 if config.get("vision_feature_layer") is None else config["vision_feature_layer"]
    if type(layer) is not int:
        raise Error(f'{file}: the field "vision_feature_layer" is {layer!r}, expected one whole number, such as -2')
    image_token = _value_or(32000, config, file, "image_token_index")
    ours = {name: config[name] for name in OURS if name in config}
    rows = _value_or(0, config, file, "rows_before_image") or None
    return {
        "tokenizer_model_max_length": text.get("max_position_embeddings"),
        **text,
        **ours,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings")),
        "image_token_index": image_token,
        "rows_before_image": rows,
        "vision_config": TOWER if config.get("vision_config") is None else config["vision_config"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
    }


def vision_config(config: dict, file: Path) -> VisionConfig:
    """The fields of CLIPVisionConfig."""
    sizes = _sizes(VisionConfig, config, file)
    _supported(config, file, hidden_act="quick_gelu", num_channels=3)
    _divides(sizes, file, "hidden_size", "num_attention_heads")
    return sizes


def language_config(config: dict, file: Path) -> LlamaConfig:
    """The fields of LlamaConfig, with rope_theta in its old place or in the newer rope_parameters."""
    _supported(config, file, hidden_act="silu", attention_bias=False, mlp_bias=False)
    sizes = _sizes(LlamaConfig, {**config, "rope_theta": _rope_theta(config, file)}, file)
    if config.get("head_dim") is None:
        _divides(sizes, file, "hidden_size", "num_attention_heads")
    _divides(sizes, file, "num_attention_heads", "num_key_value_heads")
    if sizes.head_dim % 2:
        raise Error(f"{file}: head_dim is {sizes.head_dim}, but rotary positions turn pairs: give an even one")
    return sizes


def _rope_theta(config: dict, file: Path) -> Any:
    """rope_theta, which may stand in three places; None where it stands in none."""
    values = [config.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            raise Error(f"{file}: {name} is {rope!r}, expected an object")
        _supported(rope, file, rope_type="default", type="default")
        values.append(rope.get("rope_theta"))
    values = [value for value in values if value is not None]
    if any(value != values[0] for value in values):
        raise Error(f"{file}: rope_theta is {' and '.join(map(repr, values))}; leave only the right one in it")
    return values[0] if values else None


def llava_config(config: dict, file: Path, vision: VisionConfig) -> LlavaConfig:
    """LLaVA's own fields around those of its two parts; `vision` is the tower's, wherever that comes from."""
    _supported(config, file, mm_vision_select_feature="patch")
    if config.get("mm_hidden_size") not in (None, vision.hidden_size):
        stated, wide = config["mm_hidden_size"], vision.hidden_size
        problem = f"mm_hidden_size is {stated!r}, but the image tower is {wide} wide"
        raise Error(f"{file}: {problem}; give the tower that mm_vision_tower names")
    layer, layers = required(config, file, "mm_vision_select_layer"), vision.num_hidden_layers
    if type(layer) is not int or layer not in range(-layers - 1, layers + 1):
        raise Error(f'{file}: the field "mm_vision_select_layer" is {layer!r}, but the tower has {layers} layers')
    aspect = _choice(config, file, "image_aspect_ratio", "crop", "square", "pad")  # square: an official word for crop
    return LlavaConfig(
        vision=vision,
        language=language_config(config, file),
        projector_type=_choice(config, file, "mm_projector_type", "linear", "mlp2x_gelu"),
        select_layer=layer,
        image_aspect_ratio="pad" if aspect == "pad" else "crop",
        use_im_start_end=_value_or(False, config, file, "mm_use_im_start_end"),
        template=_choice(config, file, "template", "vicuna_v1", *TEMPLATES),
        max_length=_value_or(2048, config, file, "tokenizer_model_max_length"),
        stage=_choice(config, file, "stage", "", "stage1", "stage2"),
    )


def _sizes(kind: type[Config], config: Any, file: Path) -> Config:
    """The fields of a config class out of a JSON object."""
    if not isinstance(config, dict):
        raise Error(f"{file}: {config!r} where an object with sizes was expected")
    types = {field.name: field.type for field in dataclasses.fields(kind) if config.get(field.name) is not None}
    return kind(**{name: _value(config, file, name, type_) for name, type_ in types.items()})


def _value_or(default: Any, config: dict, file: Path, name: str) -> Any:
    """A field of the default's kind; the default where it is absent or null."""
    return default if config.get(name) is None else _value(config, file, name, type(default))


def _value(config: dict, file: Path, name: str, kind: Any) -> Any:
    """A field that is there, found to be a positive number, or true or false where `kind` is bool."""
    value, numbers = config[name], (int, float) if kind is float else (int,)
    if kind is bool and not isinstance(value, bool):
        raise Error(f'{file}: the field "{name}" is {value!r}, expected true or false')
    # 1e300 and not infinity: a longer whole number fits no float
    if kind is not bool and (not isinstance(value, numbers) or isinstance(value, bool) or not 0 < value < 1e300):
        raise Error(f'{file}: the field "{name}" is {value!r}, expected a positive number')
    if kind not in (bool, float) and value > LIMITS.get(name, WIDEST):
        raise Error(f'{file}: the field "{name}" is {value!r}, more than any model has; is it damaged?')
    return value


def _supported(config: dict, file: Path, **fields: Any) -> None:
    """Raises Error for a field that has another value than the one implemented here."""
    for name, value in fields.items():
        if config.get(name) not in (None, value):
            raise Error(f'{file}: the field "{name}" is {config[name]!r}; only {value!r} is supported')


def _divides(sizes: Config, file: Path, whole: str, part: str) -> None:
    if getattr(sizes, whole) % getattr(sizes, part):
        raise Error(f"{file}: {whole} {getattr(sizes, whole)} is not a multiple of {part} {getattr(sizes, part)}")


def _choice(config: dict, file: Path, name: str, default: str, *others: str) -> str:
    """A field with a few possible values, of which the first is what its absence means."""
    value = default if config.get(name) is None else config[name]
    if value not in (default, *others):
        choices = ", ".join(dict.fromkeys(choice for choice in (default, *others) if choice))
        raise Error(f'{file}: the field "{name}" is {value!r}, expected one of: {choices}')
    return value


# ---------------------------------------------------------------- out


def vision_fields(config: VisionConfig) -> dict:
    """config.json of an image tower, as CLIPVisionConfig writes it."""
    kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return {**kind, **dataclasses.asdict(config), "hidden_act": "quick_gelu", "num_channels": 3}


def language_fields(config: LlamaConfig, dtype: torch.dtype) -> dict:
    """config.json of a decoder, as LlamaConfig writes it."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fixed = {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    return {**kind, **dataclasses.asdict(config), **fixed, "torch_dtype": str(dtype).removeprefix("torch.")}


def llava_fields(config: LlavaConfig, dtype: torch.dtype) -> dict:
    """config.json of a LLaVA: the official fields of v1.5, and three of ours (vision_config, template, stage)."""
    return {
        **language_fields(config.language, dtype),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vision_config": vision_fields(config.vision),
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": config.image_aspect_ratio,
        "tokenizer_model_max_length": config.max_length,
        "tokenizer_padding_side": "right",
        "template": config.template,
        "stage": config.stage,
    }


def llava_hf_fields(config: LlavaConfig, dtype: torch.dtype, image_token: int, vocab_size: int) -> dict:
    """config.json of LlavaForConditionalGeneration (llava-hf), its vocabulary widened to hold the image token; with
    four fields of ours, which transformers leaves alone."""
    official = llava_fields(config, dtype)
    text = language_fields(config.language, dtype) | {"vocab_size": vocab_size}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision_fields(config.vision),
        "image_token_index": image_token,
        "rows_before_image": config.language.vocab_size,
        "pad_token_id": image_token + 1,
        "image_seq_length": config.vision.num_patches,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.language.tie_word_embeddings,
        "torch_dtype": text["torch_dtype"],
        **{name: official[name] for name in OURS},
    }
