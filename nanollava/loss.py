"""The training loss (LLaVA equation 3) without the (n, V) table of logits.

    loss = sum_i  logsumexp_j(h_i . w_j) - h_i . w_target(i)
    d loss / d h_i = sum_j (p_ij - [j = target(i)]) w_j,  and the same with h in place of w for the head's rows

Logits exist for a few target positions at a time. Their gradients are taken while they are there, in the forward pass,
so no logits are kept, only these (n, D) and (V, D), and nothing is computed twice.

Shapes: n target positions, D language width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# positions whose logits exist at a time: (512, 32000) in float32 are 66 MB. Fewer are slower, for each chunk reads and
# writes the head's gradient once; more are hardly faster
CHUNK = 512


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Hidden states (n, D), the head's weight (V, D), target ids (n,) -> the summed cross-entropy, a float32 scalar
    (float64 where ``hidden`` is).

    Products are taken in autocast's dtype, or the head's; softmax and sums in float32. The head's gradient is not
    computed where it needs none (stage 1), and no gradient is under no_grad.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    with torch.autocast(device, enabled=False):  # or it would cast the head anew for every chunk
        return SummedCrossEntropy.apply(hidden, head, targets, dtype, chunk, torch.is_grad_enabled())


class SummedCrossEntropy(torch.autograd.Function):
    """``backward`` has only to scale what ``forward`` left."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int, training: bool
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        x, w = hidden.to(dtype), head.to(dtype)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if training and ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=exact) if training and ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk):
            some = slice(start, start + chunk)
            logits, target = (x[some] @ w.T).to(exact), targets[some, None]
            scale = logits.logsumexp(dim=1, keepdim=True)
            total += (scale - logits.gather(1, target)).sum()
            if d_hidden is None and d_head is None:
                continue
            d_logits = logits.sub_(scale).exp_()  # the probabilities; one less at the target
            d_logits = d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1)).to(dtype)
            if d_hidden is not None:
                d_hidden[some] = d_logits @ w
            if d_head is not None:
                add_product(d_head, d_logits.T, x[some])
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        """In place: a second call finds its saved tensors changed, and PyTorch says so."""
        d_hidden, d_head = ctx.saved_tensors
        d_hidden = d_hidden if d_hidden is None else d_hidden.mul_(grad)
        d_head = d_head if d_head is None else d_head.mul_(grad).to(ctx.dtype)
        return d_hidden, d_head, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where possible without a tensor for the product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
