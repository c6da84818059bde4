"""LoRA (Hu et al., 2021, section 4.1): each linear layer of the decoder's blocks stays as it is and learns a small sum,

    y = W x + (alpha / r) B A dropout(x)        A (r, in) random, B (out, r) zero at the start

so that gradients and AdamW's moments are those of A and B alone. v1.5's settings: r 128, alpha 256, dropout 0.05, rate
2e-4, and 2e-5 for the projector, which is trained in full. Head, embedding, norms and tower stay frozen.

While the run goes on its folder holds what was trained, as the official code and PEFT lay it out, in float32: the same
numbers are not to be had back from merged weights. --resume reads the base once more from where it came. The result is
a whole model, merged, in the dtype of the base.
"""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nanollava import folder as files
from nanollava.checkpoint import write_settings
from nanollava.error import Error, first_line
from nanollava.layouts import LLAMA, PROJECTOR, ours, theirs
from nanollava.llama import Llama
from nanollava.llava import Llava
from nanollava.lora import add_adapter, match, read_halves
from nanollava.train import distributed

if TYPE_CHECKING:
    from nanollava.train.loop import Options

RANK, DROPOUT, RATE, PROJECTOR_RATE = 128, 0.05, 2e-4, 2e-5  # v1.5; its alpha is twice the rank
WRAPPED = "base_model.model."  # what PEFT puts in front of every name


class LoRALinear(nn.Module):
    """A linear layer and what it learns. ``base`` is frozen; A and B are float32, whatever the dtype of the base."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, dropout
        device = base.weight.device
        where = device if device.type == "meta" else "cpu"  # the same numbers whatever it is trained on
        A = torch.empty(rank, base.in_features, device=where, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as PEFT, and as nn.Linear: within 1 / sqrt(in)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.A)  # (..., r)
        return self.base(x) + self.scale * F.linear(inner, self.B)


def adapt(model: Llava, rank: int, alpha: float, dropout: float) -> None:
    """Freeze the decoder and put a LoRALinear in the place of every linear layer of its blocks; what is trained is
    float32. Raises Error for a rank above the smallest side of their matrices."""
    model.language.requires_grad_(False)
    model.projector.float()
    places = [(parent, name, child) for parent, name, child in children(model.language) if isinstance(child, nn.Linear)]
    smallest = min((linear.weight for _, _, linear in places), key=lambda weight: min(weight.shape))
    if rank > min(smallest.shape):
        shape = " x ".join(map(str, smallest.shape))
        raise Error(f"--lora {rank}: the smallest matrix is {shape}; give a rank of {min(smallest.shape)} at most")
    for parent, name, linear in places:
        setattr(parent, name, LoRALinear(linear, rank, alpha, dropout))


@torch.no_grad()
def merge(model: Llava) -> None:
    """Put W + (alpha / r) B A, summed in float32, in the place of every LoRALinear: the model is then like any other,
    all of it in the dtype of the base. Raises Error where a sum is too large for that."""
    for parent, name, adapted in children(model.language):
        if isinstance(adapted, LoRALinear):
            if not add_adapter(adapted.base.weight, adapted.A, adapted.B, adapted.scale):
                raise Error(f"an adapter makes a weight too large for {adapted.base.weight.dtype}; use a lower --lr")
            setattr(parent, name, adapted.base)
    model.projector.to(model.language.norm.weight.dtype)
    model.eval()


def children(language: Llama) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of all modules inside the blocks: a list, so that they may be replaced."""
    return [(parent, name, child) for parent in language.layers.modules() for name, child in parent.named_children()]


def adapters(language: Llama) -> Iterator[tuple[str, LoRALinear]]:
    """The name of each adapted weight in a decoder without adapters, and what adapts it."""
    for name, module in language.named_modules():
        if isinstance(module, LoRALinear):
            yield f"{name}.weight", module


def seed_dropout(model: Llava, seed: int, step: int) -> None:
    """Have dropout draw what it would draw at this step of an undisturbed run, in each of several processes something
    else. ``eval()`` ends it."""
    model.train()
    torch.manual_seed(seed * 1_000_003 + step + distributed.rank() * 2**25)  # on a CPU the last 32 bits count


def base_checksum(model: Llava) -> str:
    """A number that tells other frozen weights from these: the bits of each tensor as integers, added up where they
    are, which no order of adding changes."""
    value = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            bits = p.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.itemsize])
            value = zlib.crc32(f"{name} {tuple(p.shape)} {p.dtype} {bits.sum(dtype=torch.int64)}".encode(), value)
    return f"weights with checksum {value:08x}"


# ---------------------------------------------------------------- the run's folder


def trained(model: Llava) -> dict[str, Tensor]:
    """The tensors that learn, by name: those of adapters and projector."""
    state = model.state_dict()
    return {name: x for name, x in state.items() if name.startswith("projector.") or name.endswith((".A", ".B"))}


def write_trained(model: Llava, tensors: dict[str, Tensor], folder: Path, options: "Options") -> None:
    """What was ``trained`` so far as an official LoRA run: `load` reads it over its base, PEFT the adapters."""
    write_settings(model, folder, model.language.norm.weight.dtype)
    halves, projector = {}, {}
    for name, tensor in tensors.items():
        part, _, inner = name.partition(".")
        if part == "projector":
            projector[WRAPPED + theirs(inner, PROJECTOR)] = tensor.cpu()
        else:
            module, _, half = inner.rpartition(".")
            module = WRAPPED + theirs(f"{module}.weight", LLAMA).removesuffix(".weight")
            halves[f"{module}.lora_{half}.weight"] = tensor.cpu()
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save(projector, folder / "non_lora_trainables.bin")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": options.base,
        "r": options.lora,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name, _ in adapters(model.language)}),
    }
    files.write_json(folder / "adapter_config.json", settings)


@torch.no_grad()
def read_trained(model: Llava, folder: Path) -> None:
    """Give the adapters and the projector what ``write_trained`` stored. Raises Error where that is damaged."""
    halves, file = read_halves(folder), folder / "non_lora_trainables.bin"
    for name, adapted in adapters(model.language):
        pair = halves.pop(name, {})
        if not match(pair, adapted.base.weight, len(adapted.A)):
            raise Error(f"{folder}: damaged (adapters of {name}); choose another --out and start again")
        adapted.A.copy_(distributed.share_of(pair["A"], adapted.A))
        adapted.B.copy_(distributed.share_of(pair["B"], adapted.B))
    try:
        stored = {ours(name, PROJECTOR): tensor for name, tensor in files.tensors(file)}
        places = model.projector.state_dict()
        model.projector.load_state_dict({name: distributed.share_of(x, places[name]) for name, x in stored.items()})
    except (RuntimeError, KeyError) as error:
        raise Error(f"{file}: damaged ({first_line(error)}); choose another --out and start again") from error
