"""transformers at the same work, with the same weights: what our users would otherwise take. Used as its own examples
do, with its fastest attention (sdpa). The one file that imports it, and only where it is installed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nanollava.bench.limits import seconds
from nanollava.bench.ours import Done, Work, learnt, timed
from nanollava.conversation import IGNORE
from nanollava.tokenizer import IMAGE_TOKEN_ID

Inputs = dict[str, Tensor]
Step = Callable[[list[Inputs]], tuple[float, float]]


def installed(name: str = "transformers") -> bool:
    return importlib.util.find_spec(name) is not None


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """LlavaForConditionalGeneration in eval mode."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = {} if device.type == "cpu" else {"device_map": str(device)}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **where).eval()
    model.generation_config.eos_token_id = None  # no answer ends early, and nothing has to be done to prevent it
    return model


def tower(model: nn.Module, pixels: Tensor) -> Work:
    """All of its blocks, as LLaVA's features are taken there: the last but one state, class token dropped."""
    layer = model.config.vision_feature_layer
    run = lambda: model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]  # noqa: E731
    return timed(pixels.device, len(pixels), run)


def prefill(model: nn.Module, x: Tensor, rows: int) -> Work:
    """(1, T, D) embeddings -> logits of the last position; of the ``rows`` ids that ours has: exports may have more."""

    def run() -> Tensor:
        return model(inputs_embeds=x, use_cache=True, logits_to_keep=1).logits[:, -1, :rows]

    return timed(x.device, x.shape[1], run)


def decode(model: nn.Module, prompt: list[int], pixels: Tensor, tokens: int) -> Work:
    """``generate``, greedy: the time for so many tokens less the time for one."""
    image, N = model.config.image_token_index, model.config.image_seq_length
    row = [t for token in prompt for t in ([image] * N if token == IMAGE_TOKEN_ID else [token])]
    ids = torch.tensor([row], device=pixels.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "pad_token_id": 0}

    def run(count: int) -> tuple[float, Tensor]:
        made = []
        with torch.inference_mode():
            work = lambda: made.append(model.generate(**given, do_sample=False, max_new_tokens=count))  # noqa: E731
            taken = seconds(pixels.device, work)
        return taken, made[0][0, ids.shape[1] :]

    def work(repetition: int) -> Done:
        first, _ = run(1)
        taken, answer = run(tokens)
        return Done((len(answer) - 1) / (taken - first), answer.double().cpu())

    return work


def trainer(model: nn.Module, stage: str, lora: int | None = None, recompute: bool = False) -> Step:
    """A training step as its users write one: padded batches -> loss and norm of the gradients. The tower is frozen;
    AdamW at rate 0, as ours."""
    model.train()
    model.requires_grad_(stage == "stage2" and not lora)
    if lora:
        adapt(model, lora)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    autocast = next(model.parameters()).is_cuda and trained[0].dtype == torch.float32

    def step(batches: list[Inputs]) -> tuple[float, float]:
        counts, total = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches], 0.0
        for batch, targets in zip(batches, counts, strict=True):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss * (targets / sum(counts))  # the mean over a step's targets, as ours
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm.item()

    return step


def adapt(model: nn.Module, rank: int) -> None:
    """PEFT's LoRA on every linear layer of the decoder's blocks, as LLaVA-1.5's recipe has it, without dropout."""
    import peft

    names = r"model\.language_model\.layers\..*_proj"
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def training(step: Step, steps: list[list[Inputs]], useful: list[int]) -> Work:
    """Steps on padded batches, in useful positions a second."""

    def work(repetition: int) -> Done:
        told, batches = [], steps[repetition]
        taken = seconds(batches[0]["labels"].device, lambda: told.append(step(batches)))
        return Done(useful[repetition] / taken, learnt(*told[0]))

    return work


def moved(batch: Inputs, device: torch.device) -> Inputs:
    return {name: tensor.to(device) for name, tensor in batch.items()}
