"""How much work there is: floating-point operations and bytes, counted from sizes.

A product of an (m, k) and a (k, n) matrix is 2 m k n operations. Only such products count, and only those that are
needed: nothing that is recomputed, no logits where there is no label, no pairs of positions that the mask leaves out.

    decoder  2 T (sum of its blocks' matrices) + 4 H E (pairs) layers      pairs = T (T + 1) / 2 of each sequence
    head     2 V D for each position whose logits are needed
    tower    2 N 3 P^2 C + [2 T (4 C^2 + 2 C I) + 4 C T^2] blocks           for each image, T = 1 + N
    projector  2 N (C D + D^2)                                              for each image; N C D where it is linear

Backward takes twice the forward pass, once for the gradients of the inputs and once for those of the weights; where the
weights are frozen, once. Attention has no weights and takes twice in any case. No gradient goes into the tower.

Letters as in the model: T positions, D width, H heads of E numbers, V vocabulary, C vision width, N patches, P patch
side, I width inside the MLP.
"""

from collections.abc import Iterable

from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.vit import VisionConfig


def causal_pairs(lengths: Iterable[int]) -> int:
    """(query, key) pairs of sequences in which every position sees itself and what is before it."""
    return sum(length * (length + 1) // 2 for length in lengths)


def block_matrices(config: LlamaConfig) -> int:
    """Numbers in the matrices of all decoder blocks."""
    D, H, K, E = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return config.num_hidden_layers * (2 * D * H * E + 2 * D * K * E + 3 * D * config.intermediate_size)


def attention_operations(config: LlamaConfig, pairs: int) -> int:
    """q k^T and the weighted sum of v, in all blocks."""
    return 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs


def decoder_operations(config: LlamaConfig, positions: int, pairs: int) -> int:
    """Forward, without the head."""
    return 2 * positions * block_matrices(config) + attention_operations(config, pairs)


def head_operations(config: LlamaConfig, positions: int) -> int:
    return 2 * config.vocab_size * config.hidden_size * positions


def tower_operations(config: VisionConfig, blocks: int) -> int:
    """One image through so many blocks."""
    C, N, T = config.hidden_size, config.num_patches, 1 + config.num_patches
    block = 2 * T * (4 * C * C + 2 * C * config.intermediate_size) + 4 * C * T * T
    return 2 * N * 3 * config.patch_size**2 * C + blocks * block


def tower_blocks(config: LlavaConfig) -> int:
    """How many of the tower's blocks the features need: 23 of 24 where they are the last but one's output."""
    return range(config.vision.num_hidden_layers + 1)[config.select_layer]


def step_operations(
    config: LlavaConfig, lengths: list[int], targets: int, images: int, trained: tuple[str, ...]
) -> int:
    """A training step, forward and backward, on records of these lengths, ``targets`` positions predicted."""
    language, N, D = config.language, config.vision.num_patches, config.language.hidden_size
    first = 2 * images * N * config.vision.hidden_size * D
    rest = 2 * images * N * D * D if config.projector_type == "mlp2x_gelu" else 0
    products = 2 * sum(lengths) * block_matrices(language) + head_operations(language, targets)
    passes = 3 if "language" in trained else 2  # forward, gradients of inputs, gradients of weights
    attention = 3 * attention_operations(language, causal_pairs(lengths))
    tower = images * tower_operations(config.vision, tower_blocks(config))
    return tower + 2 * first + 3 * rest + passes * products + attention


def weight_bytes(language: Llama) -> int:
    """What decoding a token reads of the decoder: all of it but the embedding, of which it takes one row, where that is
    not the head as well."""
    tied = any(t.data_ptr() == language.embed_tokens.weight.data_ptr() for t in language.lm_head.parameters())
    tensors = {t.data_ptr(): t for t in [*language.parameters(), *language.buffers()]}
    return sum(t.nbytes for t in tensors.values()) - (0 if tied else language.embed_tokens.weight.nbytes)


def cache_bytes(config: LlamaConfig, positions: float, itemsize: int) -> float:
    """Keys and values of so many positions, in all blocks."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions * itemsize
