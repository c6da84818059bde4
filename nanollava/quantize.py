"""Eight bits for a weight: a transformation of a loaded model, which then answers in less memory and, compiled, faster.

    W[o, i] ~ q[o, i] s[o],   s[o] = max_i |W[o, i]| / 127,   q a whole number from -127 to 127

Activations keep their precision (weight-only, absmax, one scale for each output; Dettmers et al., 2022, section 2.1). A
new token reads every weight once, so bytes are time: a quarter of float32's, half of bfloat16's. That gain needs the
compiled step (``decoding.py``), which widens q on its way into the product; without it a widened copy is made first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanollava.error import Error
from nanollava.llava import Llava

ONLY_ANSWERS = "int8 weights can only answer: train, save or convert the model before quantize()"


class Int8Linear(nn.Module):
    """The linear layer (..., in) -> (..., out) that it is made from, which has no bias, with int8 weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # no row is divided by 0
        self.register_buffer("q", (weight / scale[:, None]).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)  # (out,), float32 whatever the activations are

    @property
    def weight(self) -> Tensor:
        raise Error(ONLY_ANSWERS)

    def _save_to_state_dict(self, *_: object) -> None:
        raise Error(ONLY_ANSWERS)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # A matrix product would have the widened weights written to memory; a sum of products, (..., 1, in) times
            # (out, in) summed over in, is one loop, and the compiler never makes what stands between.
            return ((x.float().unsqueeze(-2) * self.q).sum(dim=-1) * self.scale).to(x.dtype)
        return F.linear(x, (self.q * self.scale[:, None]).to(x.dtype))


def quantize(model: Llava) -> Llava:
    """Replace every matrix of the language model but the embedding by its int8 form, in place; returns the model.

    One after the other; beside the model only one matrix is in memory, in float32. A head that is tied to the embedding
    becomes a matrix of its own. The result answers; it can be neither trained nor saved (Error).
    """
    for name, module in list(model.language.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.language.get_submodule(parent), child, Int8Linear(module))
    return model
