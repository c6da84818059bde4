"""LoRA runs of the official code: for some matrices W (out, in) of the language model two small ones, A (r, in) and
B (out, r), as PEFT stores them. Here they are merged, W + (lora_alpha / r) B A, and no trace of them is left (Hu et
al., 2021, section 4.1)."""

import re
from pathlib import Path

import torch
from torch import Tensor

from nanollava import folder as files
from nanollava.error import Error, some
from nanollava.layouts import LLAMA, ours
from nanollava.llama import Llama
from nanollava.weights import finite, usable

# options of PEFT that are not implemented, each with the value that leaves W + (lora_alpha / r) B A as it is
PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "layer_replication": None,
    "alora_invocation_tokens": None, "lora_bias": False, "use_qalora": False, "target_parameters": [],
    "trainable_token_indices": None,
}  # fmt: skip


@torch.no_grad()
def merge_folder(language: Llama, folder: Path) -> None:
    """Add the adapters of a folder to the language model's weights, in place; sums are taken in float32.

    Raises Error for settings that are not supported, and where the adapters do not fit the weights.
    """
    config = files.read_json(folder / "adapter_config.json")
    for name, plain in PLAIN.items():
        if config.get(name) not in (None, plain):
            raise Error(f'{folder / "adapter_config.json"}: the field "{name}" is {config[name]!r}; not supported')
    start = config.get("init_lora_weights")
    if start not in (None, True, False, "gaussian"):  # PiSSA and others change the base itself
        raise Error(f'{folder / "adapter_config.json"}: the field "init_lora_weights" is {start!r}; not supported')
    rank, alpha = (config.get(name) for name in ("r", "lora_alpha"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not abs(alpha) < 1e6:
        file = folder / "adapter_config.json"
        raise Error(
            f'{file}: "r" is {rank!r} and "lora_alpha" {alpha!r}, expected numbers below a million; download it again'
        )
    weights, halves = dict(language.named_parameters()), read_halves(folder)
    if missing := [name for name in weights if name not in halves and is_target(name, config)]:
        raise Error(f"{folder}: {some(missing)} have no adapters, which its target_modules promise; fetch it again")
    if unfit := [name for name, pair in halves.items() if not match(pair, weights.get(name), rank)]:
        raise Error(f"{folder}: {some(unfit)} adapters are not finite, or do not fit the base; is it right?")
    for name, pair in halves.items():
        if not add_adapter(weights[name], pair["A"], pair["B"], alpha / rank):
            raise Error(f"{folder}: its adapters make {name} too large for {weights[name].dtype}; try a wider dtype")


def add_adapter(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> bool:
    """weight (out, in) += scale B A, in place, summed in float32; whether the dtype holds the sum."""
    update = B.float() @ A.float() * scale
    weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))
    return finite(weight)


def is_target(name: str, config: dict) -> bool:
    """Whether target_modules names a weight's module; where it chooses layers or excludes modules, none is checked."""
    targets, module = config.get("target_modules"), name.removesuffix(".weight")
    chosen = any(config.get(choice) is not None for choice in ("layers_to_transform", "exclude_modules"))
    if chosen or not module.startswith("layers.") or "norm" in module:
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or bool(re.fullmatch(targets, f"model.{module}"))
    return any(module == target or module.endswith(f".{target}") for target in targets or [])


def match(pair: dict[str, Tensor], weight: Tensor | None, rank: int) -> bool:
    """Whether A and B are there, finite, and of the shapes that the weight asks for."""
    if weight is None or not all(map(usable, pair.values())):
        return False
    shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
    return shapes == {"A": (rank, weight.shape[1]), "B": (weight.shape[0], rank)}


def read_halves(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Our parameter name -> its "A" and "B"."""
    file = next((f for f in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if f.is_file()), None)
    if file is None:
        raise Error(f"{folder}: no adapter_model.safetensors or .bin in it; is the download complete?")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.tensors(file):
        module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").partition(".lora_")
        target, half = str(ours(f"{module}.weight", LLAMA)), half.removesuffix(".default")
        if half in halves.setdefault(target, {}):
            raise Error(f"{file}: {target} has two adapters {half}; download it again")
        halves[target][half] = tensor.clone()
    if not halves:
        raise Error(f"{file}: no adapters in it; download it again")
    return halves
