"""Vicuna: a LLaMA decoder (Touvron et al., 2023; LLaVA section 4.1).

    x = x + attention(RMSNorm(x));  x = x + SwiGLU(RMSNorm(x))

with rotary positions on queries and keys. The names of the modules are those of the official checkpoints.

Shapes: B batch, T positions, D width, H query heads, K key/value heads, E width of a head, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanollava.attention import Attend, Mask, attention


@dataclass
class LlamaConfig:
    """The sizes of a decoder, by the names of official configs; the defaults are those of LlamaConfig (7B)."""

    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008  # width inside SwiGLU
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # K; None means H: every query head has its own keys and values
    head_dim: int | None = None  # E; None means D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False  # the head reuses the embedding matrix

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, and only then times the weight, as LLaMA was trained."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, T) positions -> cos and sin, each (B, 1, T, E): pair i turns by position * theta^(-2i/E)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # not theta**-exponents: at position 4000 the rounding shows
    angles = positions[..., None].float() * frequencies  # (B, T, E/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)  # the two halves of a head turn by the same angles
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of x, (B, heads, T, E), by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)  # under autocast cos and sin are float32


class Cache:
    """Keys and values of all positions so far, for decoding one token at a time; the memory is taken at once."""

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = batch, config.num_key_value_heads, capacity, config.head_dim
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.length = 0  # positions filled, the same in every layer between two forward passes

    def span(self, T: int) -> int:
        """How many keys ``extend`` returns when T more come."""
        return self.length + T

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, K, T, E), behind what is there; return everything stored, (B, K, length + T, E)."""
        end = self.span(k.shape[2])
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class SelfAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, H, K, E = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim = layer, E
        self.q_proj = nn.Linear(D, H * E, bias=False)
        self.k_proj = nn.Linear(D, K * E, bias=False)
        self.v_proj = nn.Linear(D, K * E, bias=False)
        self.o_proj = nn.Linear(H * E, D, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, cache: Cache | None) -> Tensor:
        q, k, v = (self.split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, H, T, E) -> (B, T, D)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, heads E) -> (B, heads, T, E)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, attend, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The language model f: (B, T) token ids -> (B, T, V) logits; ``hidden`` takes embeddings (B, T, D) instead, for
    sequences that are words and image tokens mixed."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(
        self, x: Tensor, positions: Tensor | None = None, mask: Mask | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Embeddings (B, T, D) -> normalised hidden states (B, T, D), ready for ``lm_head``.

        positions is (B, T), by default 0, 1, 2, ... behind what the cache holds; mask by default plain causal. With a
        cache the mask's tensors span all its positions, filled and new.
        """
        B, T, _ = x.shape
        past, keys = (cache.length, cache.span(T)) if cache is not None else (0, T)
        if positions is None:
            positions = torch.arange(past, past + T, device=x.device).expand(B, T)
        angles = rotary_angles(positions, self.config, x.dtype)
        attend = attention(mask or Mask(offset=past), B, T, keys, x.device)
        for block in self.layers:
            x = block(x, angles, attend, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits."""
        return self.lm_head(self.hidden(self.embed_tokens(token_ids), cache=cache))
