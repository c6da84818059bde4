"""The bridge from patch features to image tokens: H_v = W Z_v (LLaVA equation 1), or the two-layer MLP of v1.5.

Shapes: B batch, N patches, C vision width, D language width.
"""

import torch
from torch import Tensor, nn

from nanollava.error import Error


def make_projector(kind: str, C: int, D: int) -> nn.Module:
    """A module (B, N, C) -> (B, N, D). ``kind`` is "linear" (the paper) or "mlp2x_gelu" (v1.5), as in official configs.

    The parameters are called as in official checkpoints after ``mm_projector.``: weight and bias, or 0.* and 2.*.
    Raises Error on any other kind.
    """
    if kind == "linear":
        return nn.Linear(C, D)
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))
    raise Error(f"mm_projector_type is {kind!r}: use linear or mlp2x_gelu")


@torch.no_grad()
def whiten(projector: nn.Module, features: Tensor, smallest: float = 1e-4) -> None:
    """Start the first layer as a random rotation of whitened features (M, C), so that what varies little is heard as
    well as what varies most. Directions with less than ``smallest`` of the largest variance stay quiet.

    Not in the paper: a small tower says where a patch lies much more softly than what is in it, and a small language
    model with little time would never hear it.
    """
    first = projector if isinstance(projector, nn.Linear) else projector[0]
    features = features.double()
    variances, axes = torch.linalg.eigh(torch.cov(features.T))
    scales = (variances.clamp(min=0) + smallest * variances.max()).rsqrt()
    rotation = nn.init.orthogonal_(torch.empty_like(first.weight, dtype=torch.float64))
    weight = rotation * scales @ axes.T
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ features.mean(dim=0))
