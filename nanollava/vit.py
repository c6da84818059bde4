"""CLIP's image tower: a Vision Transformer (Radford et al., 2021; LLaVA section 4.1).

    pixels (B, 3, S, S) -> patches (B, N, C) -> class token + positions (B, 1 + N, C) -> blocks -> features (B, N, C)

LLaVA takes the output of the last block but one, without the class token and without the final norm. The names of the
modules are those of the official checkpoints.

Shapes: B batch, S image side, P patch side, N = (S / P)^2 patches, T = 1 + N, C width, H heads, E = C / H.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanollava.attention import Attend, Mask, attention
from nanollava.error import Error


@dataclass
class VisionConfig:
    """The defaults are those of transformers' CLIPVisionConfig (ViT-B/32): official config.json files list only what
    differs from it. The paper's ViT-L/14 has S 224, P 14, C 1024, 4096 inside, 24 blocks, 16 heads: N = 256."""

    image_size: int = 224  # S, pixels
    patch_size: int = 32  # P, pixels
    hidden_size: int = 768  # C
    intermediate_size: int = 3072  # width inside the MLP
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Pixels to a sequence: one vector for each patch, the class token in front, learned positions added."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, P = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(C) * C**-0.5)
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.position_embedding = nn.Embedding(1 + config.num_patches, C)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, C, S/P, S/P) -> (B, N, C), row by row
        class_token = self.class_embedding.expand(len(pixels), 1, -1)  # (B, 1, C)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight  # (B, 1 + N, C)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = (self.split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, H, T, E) -> (B, T, C)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, E)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy and adds its result to the stream."""

    def __init__(self, width: int, inner: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attend)
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """The vision tower g: (B, 3, S, S) pixels, prepared by ``preprocess`` -> patch features (B, N, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt as in the checkpoints
        sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps
        self.layers = nn.ModuleList(Block(*sizes) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's; LLaVA never uses it

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + N, C), class token first: hidden state number ``layer`` as CLIP counts them.

        0 is what enters the first block, k the output of block k; negative numbers count from the end. Raises Error for
        pixels of another shape.
        """
        S = self.config.image_size
        if pixels.shape[1:] != (3, S, S):
            raise Error(f"pixels are {tuple(pixels.shape)}, the tower takes (images, 3, {S}, {S}): see preprocess")
        depth = range(len(self.layers) + 1)[layer]
        x = self.pre_layrnorm(self.embeddings(pixels))
        attend = attention(Mask(causal=False), len(x), x.shape[1], x.shape[1], x.device)
        for block in self.layers[:depth]:
            x = block(x, attend)
        return x

    def forward(self, pixels: Tensor, layer: int = -2) -> Tensor:
        """(B, 3, S, S) -> patch features (B, N, C): output of the last block but one, class token dropped."""
        return self.hidden_state(pixels, layer)[:, 1:]

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C): CLIP's summary of an image, the normalised class token of the last block."""
        return self.post_layernorm(self.hidden_state(pixels, -1)[:, 0])
