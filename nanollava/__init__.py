"""LLaVA ("Visual Instruction Tuning", Liu et al., 2023) from scratch in plain PyTorch.

The public names below are imported when first used, so that `python chat.py --help` need not wait for PyTorch.
"""

from importlib import import_module

PUBLIC = {
    "load": "checkpoint",
    "load_vision": "checkpoint",
    "load_language": "checkpoint",
    "save": "checkpoint",
    "load_tokenizer": "tokenizer",
    "preprocess": "images",
    "encode": "conversation",
    "TEMPLATES": "conversation",
    "Chat": "generate",
    "attention_maps": "attention",
    "patch_attention": "maps",
    "Error": "error",
}


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'nanollava' has no attribute {name!r}")
    return getattr(import_module(f"nanollava.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
