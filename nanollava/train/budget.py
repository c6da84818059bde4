"""What a run will take, worked out from sizes alone, before a weight is read: parameters and memory by kind. Bytes
throughout; one line says where each term comes from. advice.py puts it into words.

Three moments compete for the peak, on top of weights and optimizer states, which are always there:

    tower      the image tower's own activations, before the decoder has any
    backward   all that the forward pass kept, as the backward pass begins; later gradients replace it
    update     all gradients, and what the optimizer needs beside them

With several micro-batches in a step the gradients of the first are there in the first two as well.

On a CPU the process holds more than its tensors: see ``heap_bytes``.

Letters: D language width, A = H E queries' width, K keys' width, I width inside SwiGLU, H heads, V vocabulary, C vision
width, N patches, T positions of a row, r rank of the adapters.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanollava.attention import FLEX_FROM, Mask, worth_splitting
from nanollava.llama import LlamaConfig
from nanollava.llava import Batch, Llava, LlavaConfig
from nanollava.loss import CHUNK
from nanollava.train import lora
from nanollava.train.data import count_targets
from nanollava.train.distributed import processes
from nanollava.train.optim import is_hidden
from nanollava.train.stages import Stage, freeze
from nanollava.vit import VisionConfig

GB = 1e9


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of a step, and how many of them there are."""

    rows: int
    length: int  # T
    targets: int  # positions that are predicted
    images: int
    parts: int = 1  # micro-batches of a step
    masked: int | None = None  # on a CPU, keys in the masks of documents taken one by one; None: one mask for each row

    @classmethod
    def largest(cls, batches: list[Batch], parallel: int) -> "Work":
        """That of a step's micro-batches, ``parallel`` of them side by side."""
        images = [0 if batch.pixels is None else len(batch.pixels) for batch in batches]
        targets, parts = [count_targets([batch]) for batch in batches], -(-len(batches) // parallel)
        masked = [masked_keys(batch.documents, batch.branches) for batch in batches]
        sizes = zip(batches, targets, images, masked, strict=True)
        works = [cls(*batch.token_ids.shape, t, i, parts, keys) for batch, t, i, keys in sizes]
        return max(works, key=cls.size, default=cls(1, 64, 1, 0))

    def size(self) -> tuple[int, int]:
        return self.rows * self.length, self.targets


@dataclass(frozen=True)
class How:
    """What of a run's options decides over memory."""

    on_cuda: bool
    optimizer: str = "adamw"  # adamw, muon or light
    lora: int | None = None  # rank
    dropout: float = 0.0
    recompute: bool = False  # blocks keep their inputs alone
    parallel: int = 1  # micro-batches at the same time, on a CPU
    processes: int = 1  # with a share each of weights, gradients and states; what they gather is not counted

    @classmethod
    def of(cls, settings: Any, device: str) -> "How":
        """From a run's options, or the command line's, which have the same names."""
        on_cuda, recompute = torch.device(device).type == "cuda", getattr(settings, "recompute", False)
        dropout, parallel = settings.lora_dropout or 0.0, 1 if on_cuda or processes() > 1 else settings.parallel
        return cls(on_cuda, settings.optimizer, settings.lora, dropout, recompute, parallel, processes())

    @property
    def matrix(self) -> int:
        """Bytes of a number that matrix products take: bfloat16 by autocast on CUDA, the weights' dtype on a CPU."""
        return 2 if self.on_cuda else self.trained

    @property
    def frozen(self) -> int:
        """Bytes of a weight that does not learn: bfloat16 on CUDA, and for the light optimizer (stages.precision)."""
        return 2 if self.on_cuda else self.trained

    @property
    def trained(self) -> int:
        """Bytes of a weight that learns: float32, but bfloat16 for the light optimizer."""
        return 2 if self.optimizer == "light" else 4


@dataclass(frozen=True)
class Budget:
    """Bytes of each kind."""

    weights: int
    states: int
    gradients: int
    activations: int  # of the decoder, as its backward pass begins, with bfloat16 copies of float32 weights
    loss: int  # logits, some at a time, and the head's gradient
    tower: int
    update: int  # beside the gradients, as weights are updated
    heap: int  # on a CPU, activations whose place stays with the process when they are freed
    parts: int  # micro-batches of a step

    @property
    def live(self) -> int:
        """The most that tensors take at one time."""
        kept = self.gradients if self.parts > 1 else 0
        moments = kept + self.tower, kept + self.activations + self.loss, self.gradients + self.update
        return self.weights + self.states + max(moments)

    @property
    def peak(self) -> int:
        """The most that is taken from the machine at one time."""
        kept = self.gradients if self.parts > 1 else 0
        moments = kept + self.activations + self.loss + 3 * self.heap // 5, self.gradients + self.update + self.heap
        return max(self.live, self.weights + self.states + max(moments))


def full_rows(config: LlavaConfig, rows: int, records: int) -> Work:
    """The most that rows can hold where no data says better: every position taken, by images of one record each with
    64 positions of text, all of it predicted; as many micro-batches as the ``records`` of a step then fill."""
    N, T = config.vision.num_patches, config.max_length
    images = rows * max(1, T // (N + 64))
    documents = (torch.arange(T) // (N + 64)).expand(rows, T)
    return Work(rows, T, max(rows, rows * T - images * N), images, -(-records // images), masked_keys(documents, None))


def masked_keys(documents: torch.Tensor, branches: torch.Tensor | None) -> int | None:
    """For each position of (B, T), the mean number of keys in the masks that a CPU writes out; None where that is one
    mask for each row, of all T. Documents of long rows are taken one by one (attention.py), those of one piece without
    a mask."""
    mask, (rows, length) = Mask(documents=documents, branches=branches), documents.shape
    split = worth_splitting(mask, length, length, torch.device("cpu"))
    if split is None:
        return None
    return -(-sum(n * n for row in split for n, allowed in row if allowed is not None) // (rows * length))


def outline(config: LlavaConfig, stage: Stage, how: How) -> Llava:
    """The model as it is trained, its tensors without numbers."""
    with torch.device("meta"):
        model = Llava(config)
    freeze(model, stage)
    if how.lora:
        lora.adapt(model, how.lora, 2 * how.lora, how.dropout)
    return model


def estimate(model: Llava, how: How, work: Work) -> Budget:
    """The budget of an ``outline``."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sizes = [p.numel() for _, p in trained]
    every, shares = sum(p.numel() for p in model.parameters()), how.processes
    largest = max(sizes)
    activations = how.parallel * decoder_bytes(model, how, work)
    return Budget(
        weights=(how.trained * sum(sizes) + how.frozen * (every - sum(sizes))) // shares,
        states=sum(p.numel() * state_bytes(name, p, how) for name, p in trained) // shares,
        gradients=gradient_bytes(model, how, work, sum(sizes)) // shares,
        activations=activations + copies(model, how),
        loss=how.parallel * loss_bytes(model, how, work),
        tower=how.parallel * tower_bytes(model.config.vision, how, work),
        # AdamW over lists of tensors, PyTorch's choice on CUDA, has all square roots at once (torch.optim, "foreach");
        # one by one it has a root and its quotient
        update=4 * (sum(sizes) if how.on_cuda and how.optimizer == "adamw" else 2 * largest) // shares,
        heap=heap_bytes(model.config.language, how, work, activations),
        parts=work.parts,
    )


def heap_bytes(c: LlamaConfig, how: How, work: Work, activations: int) -> int:
    """How many of the activations' bytes lie on the C library's heap. It keeps what is freed (keep_freed_memory) and,
    since blocks of many sizes do not fill each other's places, grows by about 3/5 of them. Measured on glibc, not
    derived; blocks from 32 MiB on come from the system and go back, somewhat smaller ones leave fewer gaps."""
    if how.on_cuda:
        return 0
    wide, narrow = (4 * work.rows * work.length * width / 2**20 for width in (c.intermediate_size, c.hidden_size))
    return activations if wide < 24 else activations // 2 if narrow < 32 else 0


def state_bytes(name: str, p: nn.Parameter, how: How) -> int:
    """Optimizer states of one number: AdamW's two moments (Kingma & Ba, 2015) in float32, Muon's momentum, or two
    moments in 16 bits."""
    if how.optimizer == "light":
        return 4
    return 4 if how.optimizer == "muon" and is_hidden(name, p) else 8


def gradient_bytes(model: Llava, how: How, work: Work, trained: int) -> int:
    """A gradient for each trained number, in its dtype; for each of the micro-batches side by side. The light optimizer
    steps inside the last backward pass of a step: where that is the only one, a single layer's are there at a time,
    otherwise those of the passes before wait for it."""
    if how.optimizer != "light" or work.parts > 1:
        return how.trained * trained * how.parallel
    layers = [*model.language.layers, model.language.embed_tokens, model.language.lm_head, model.projector]
    return how.trained * max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers)


def copies(model: Llava, how: How) -> int:
    """Autocast's bfloat16 copies of float32 matrices: the backward pass needs them, so the graph keeps them; where
    blocks are recomputed they are kept for the forward pass. The head's own are counted with the loss."""
    if not how.on_cuda:
        return 0
    matrices = [p for p in model.language.layers.parameters() if p.ndim == 2]
    return 2 * sum(p.numel() for p in matrices if bytes_of(p, how) == 4)


def bytes_of(p: nn.Parameter, how: How) -> int:
    """Those of each of its numbers. The embedding's are also those of the sum that runs through the blocks."""
    return how.trained if p.requires_grad else how.frozen


def decoder_bytes(model: Llava, how: How, work: Work) -> int:
    """What the blocks and the last norm keep for the backward pass, and what one block needs while it goes through."""
    c, layers = model.config.language, model.config.language.num_hidden_layers
    positions, trains = work.rows * work.length, any(p.requires_grad for p in model.language.parameters())
    block = block_bytes(c, how, work.length, trains, work.masked)
    summed = bytes_of(model.language.embed_tokens.weight, how)
    passing = how.matrix * 3 * c.intermediate_size + summed * 3 * c.hidden_size  # gradients inside one block
    end = (4 + summed + how.matrix) * c.hidden_size  # the last norm and what the head takes
    if how.recompute:  # Chen et al., 2016: inputs of all blocks, the rest of one
        return positions * (layers * summed * c.hidden_size + block + passing + end)
    return positions * (layers * block + passing + end)


def block_bytes(c: LlamaConfig, how: How, length: int, trains: bool, masked: int | None = None) -> int:
    """What autograd keeps of one block for one position: `saved_tensors_hooks` shows the same list. masked: as in
    ``Work``."""
    D, I, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    A, K, n = H * c.head_dim, c.num_key_value_heads * c.head_dim, how.matrix
    kept = 2 * 4 * (D + 1)  # RMSNorm computes in float32: its input and 1 / root mean square
    kept += n * (2 * A + 2 * K) + 4 * H  # q and k turned, v, the result; log of each softmax's sum (Dao et al., 2022)
    kept += n * 3 * I  # gate, silu(gate), up
    if not how.on_cuda:
        kept += 4 * (length if masked is None else masked)  # the mask is made numbers, anew in each layer
        joined = masked is not None and (trains or (how.lora and not how.dropout))
        kept += n * A if joined else 0  # the row of the documents' results, which the last matrix takes
    elif length < FLEX_FROM:
        kept += n * (length + 2 * (A - K))  # the same, and keys and values for each query head
    if how.lora:
        inputs = (5 * D + A + I) * (n + (1 if how.on_cuda else 4)) if how.dropout else n * (2 * D + I)
        return kept + inputs + 7 * n * how.lora  # what dropout leaves, its mask, and A x, for seven matrices a block
    if trains:
        kept += 2 * how.trained * D  # what a norm's weight multiplies
        shared = how.trained == n  # or autocast makes a copy for each matrix
        kept += n * ((2 if shared else 5) * D + I)  # inputs of q, k, v; gate, up; down
    return kept


def loss_bytes(model: Llava, how: How, work: Work) -> int:
    """Logits of a few targets, their exponentials beside them, and the gradient of the head, which is complete before
    the backward pass begins."""
    head, exact = model.language.lm_head.weight, 4
    logits = min(work.targets, CHUNK) * head.shape[0] * (2 * exact + (how.matrix if how.on_cuda else 0))
    copy = how.matrix if how.on_cuda and bytes_of(head, how) == 4 else 0
    return logits + head.numel() * (copy + exact * head.requires_grad) + 2 * exact * work.targets * head.shape[1]


def tower_bytes(c: VisionConfig, how: How, work: Work) -> int:
    """The frozen tower keeps nothing; inside one MLP stand its input twice and three times what is between its layers
    (fc1's result, the sigmoid, their product). The pixels come as float32."""
    inside = how.matrix * (2 * c.hidden_size + 3 * c.intermediate_size)
    return work.images * ((1 + c.num_patches) * inside + 4 * 3 * c.image_size**2)
