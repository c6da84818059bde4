"""Which patches the words of an answer looked at."""

import torch
from torch import Tensor

from nanollava.attention import attention_maps
from nanollava.error import Error
from nanollava.llava import NO_PATCH, Llava


@torch.no_grad()
def patch_attention(model: Llava, prompt: list[int], answer: list[int], pixels: Tensor | None) -> Tensor:
    """How much each token of an answer looked at each patch, in each layer and head, when it was chosen:
    (tokens, M, layers, H, S/P, S/P), M images of side S with patches of side P, as they lie in the picture.

    prompt: token ids from ``encode``; pixels: (M, 3, S, S), its images in reading order.
    answer: the ``ids`` of an ``Answer``, or any others: one forward pass over both gives all of it.
    A token is chosen at the position before it, so that position's weights are its own. They are those of
    ``attention_maps``: with what goes to words, they sum to one.
    Raises Error on an empty answer, and where the prompt has no image, or more or fewer than ``pixels``.
    """
    if not answer:
        raise Error("the answer is empty: it has no token whose attention could be shown")
    rows, patches = model.splice_rows([[*prompt, *answer[:-1]]], 0 if pixels is None else len(pixels))
    if pixels is None or not len(pixels):
        raise Error("the prompt has no <image>: there are no patches to look at")
    token_ids, where = (torch.tensor(row, device=model.device) for row in (rows, patches))  # (1, T)
    x = model.embed(token_ids, where, pixels.to(model.device))
    with attention_maps() as maps:
        model.language.hidden(x)
    (layers,) = maps
    weights = torch.cat([layer[:, :, -len(answer) :, where[0] != NO_PATCH] for layer in layers])  # (layers, H, n, M N)
    side = model.config.vision.image_size // model.config.vision.patch_size
    return weights.unflatten(-1, (-1, side, side)).permute(2, 3, 0, 1, 4, 5)
