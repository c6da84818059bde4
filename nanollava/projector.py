"""The bridge from patch features to image tokens: H_v = W Z_v (LLaVA equation 1), or the two-layer MLP of v1.5.

Shapes: B batch, N patches, C vision width, D language width.
"""

from torch import nn

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
