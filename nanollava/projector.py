"""The bridge from patch features to image tokens: H_v = W Z_v (LLaVA equation 1; with a bias, as in the official code),
or the two-layer MLP of v1.5.

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
def whiten(projector: nn.Module, features: Tensor, smallest: float = 1e-2) -> None:
    """Start the first layer so that what comes out of it for patch features, M times N rows (M N, C) of M images, has
    mean zero and about the same variance in all directions that matter:

        x -> R A^T (x - mean) / sqrt(variances + smallest * max(variances))

    where A and variances are the eigenvectors and eigenvalues of the features' covariance and R (D, C) is random with
    orthonormal rows or columns. Far above ``smallest`` the variance becomes one, far below, where noise is, it stays
    near zero. Raises Error where the features do not vary.

    Not in the paper: a small tower says where a patch lies with much less variance than what is in it; without this, a
    small language model learns the one much later than the other.
    """
    first = projector if isinstance(projector, nn.Linear) else projector[0]
    features = features.cpu().double()
    if len(features) < 2 or not features.var(dim=0).max() > 0:
        raise Error("the features of these images do not vary: start the projector without whitening them")
    variances, axes = torch.linalg.eigh(torch.cov(features.T))  # (C,), (C, C)
    scales = (variances.clamp(min=0) + smallest * variances.max()).rsqrt()
    rotation = nn.init.orthogonal_(torch.empty(first.weight.shape, dtype=torch.float64))
    weight = rotation * scales @ axes.T  # (D, C)
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ features.mean(dim=0))
