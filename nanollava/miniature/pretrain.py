"""The two parts that the paper takes as given, made small: a CLIP and a Vicuna, and a tokenizer for both.

CLIP (Radford et al., 2021) learns which caption belongs to which image, from images and captions alone. Vicuna's
stand-in learns to talk about scenes that it is told of in words. Both end up as ordinary official folders.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanollava.attention import Mask, attention
from nanollava.checkpoint import load, save_language, save_vision
from nanollava.conversation import IGNORE, messages_from_record, render
from nanollava.images import open_image, preprocess
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import Llava, LlavaConfig, pad
from nanollava.miniature.world import FAMILY, Annotated, read_split
from nanollava.progress import minutes
from nanollava.tokenizer import Tokenizer, load_tokenizer
from nanollava.train.data import Dataset
from nanollava.train.loop import Options, train
from nanollava.train.machine import keep_freed_memory
from nanollava.train.optim import make_optimizers, set_learning_rate, warmup_cosine
from nanollava.train.records import Example, group, make_example, read_list
from nanollava.train.resume import progress
from nanollava.train.stages import Stage
from nanollava.vit import Block, VisionConfig, VisionTransformer

# 3 x 3 patches, one for each of the nine places: an image is nine tokens, and to find a place is to choose one of them.
VISION = VisionConfig(48, 16, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
LANGUAGE_STAGE = Stage("language", ("language",), "vicuna_v1", lr=2e-3, batch_size=6, epochs=1)
ASCII = "".join(map(chr, range(33, 127)))
SHARE_OF_SINGLE_THINGS = 0.25  # of the contrastive steps: first what "red" and "star" look like, then which is which


def train_tokenizer(world: Path, folder: Path) -> Tokenizer:
    """A SentencePiece model of whole words with LLaMA's special ids and byte fallback, from the world's text."""
    folder.mkdir(parents=True, exist_ok=True)
    records = read_list(world / "text.json")[:20_000]
    told = [render(messages_from_record(r), "vicuna_v1").replace("</s>", " ") for r in records]
    captions = [text for image in read_split(world, "val") for text in image.captions]  # a few are enough
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join([*told, *captions]).split("\n")), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=1000, hard_vocab_limit=False, character_coverage=1.0, required_chars=ASCII,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return load_tokenizer(folder)


class TextTower(nn.Module):
    """CLIP's other half: causal blocks over a caption, read off at its last token. Needed only while CLIP is made."""

    def __init__(self, vocab_size: int, width: int = 128, layers: int = 3, positions: int = 64):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(Block(width, 4 * width, width // 32) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.1)

    def forward(self, captions: list[list[int]]) -> Tensor:
        """B captions as token ids -> (B, width)."""
        ids = pad(captions, 0)  # (B, T)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        attend = attention(Mask(), *ids.shape, ids.shape[1], ids.device)
        for block in self.layers:
            x = block(x, attend)
        return self.final_layer_norm(x[torch.arange(len(x)), torch.tensor([len(c) - 1 for c in captions])])


class Clip(nn.Module):
    """Two towers into one space, in which an image lies next to its caption (Radford et al., 2021, figure 3)."""

    def __init__(self, vision: VisionConfig, vocab_size: int, width: int = 128):
        super().__init__()
        self.vision, self.text = VisionTransformer(vision), TextTower(vocab_size, width)
        self.visual_projection = nn.Linear(vision.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        nn.init.normal_(self.vision.embeddings.position_embedding.weight, std=0.5)
        # the stream starts small: what the blocks learn to add soon outweighs the raw pixels
        nn.init.constant_(self.vision.pre_layrnorm.weight, 0.1)
        for block in self.vision.layers:  # adding nothing yet: so a patch keeps to its own content, not its neighbours'
            for last in (block.self_attn.out_proj, block.mlp.fc2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def similarity(self, pixels: Tensor, captions: list[list[int]]) -> Tensor:
        """(B, 3, S, S) images and B captions -> (B, B): scaled cosine of every image with every caption."""
        images = F.normalize(self.visual_projection(self.vision.pooled(pixels)), dim=1)
        texts = F.normalize(self.text_projection(self.text(captions)), dim=1)
        return self.logit_scale.exp().clamp(max=100) * images @ texts.T

    def loss(self, pixels: Tensor, captions: list[list[int]]) -> Tensor:
        """Each image must find its caption among all of the batch, and each caption its image."""
        similarity = self.similarity(pixels, captions)
        own = torch.arange(len(similarity))
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def pretrain_vision(world: Path, folder: Path, tokenizer: Tokenizer, steps: int, lr: float = 2e-3, families: int = 32):
    """Train a small CLIP on the world's images and captions; leave its image tower in ``folder``, an official one."""
    torch.manual_seed(0)
    keep_freed_memory()
    images = read_split(world, "train")
    clip = Clip(VISION, tokenizer.vocab_size)
    started, mean = time.perf_counter(), math.log(families * FAMILY)  # first loss: guessing among all captions
    losses = clip_steps(clip, load_pixels(world, images), images, tokenizer, steps, lr, families)
    for step, loss in enumerate(losses):
        mean += 0.05 * (loss - mean)
        if step == 0 or (step + 1) % 50 == 0:
            left = (time.perf_counter() - started) / (step + 1) * (steps - step - 1)
            print(f"CLIP {step + 1:>5}/{steps}  loss {mean:.4f}  {minutes(left)} left", flush=True)
    save_vision(clip.vision, folder)


def clip_steps(
    clip: Clip, pixels: Tensor, images: list[Annotated], tokenizer: Tokenizer, steps: int, lr: float, families: int
) -> Iterator[float]:
    """Contrastive training, a step whenever the next loss is asked for. pixels: (M, 3, S, S), those of the M images."""
    optimizers = make_optimizers([(clip, lr)], "muon")
    for step, numbers in enumerate(draw_families(images, steps, families)):
        rng = random.Random(step)
        captions = [tokenizer.encode(rng.choice(images[n].captions), bos=False) for n in numbers]
        loss = clip.loss(pixels[numbers].float(), captions)
        set_learning_rate(optimizers, warmup_cosine(step, steps))
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item()


def load_pixels(world: Path, images: list[Annotated]) -> Tensor:
    """(M, 3, S, S) of all images, in half precision: they are met many times, and reading them takes longer."""
    read = lambda image: preprocess(open_image(world / "images" / image.name), VISION.image_size).half()  # noqa: E731
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(read, images)))


def draw_families(images: list[Annotated], steps: int, families: int) -> Iterator[list[int]]:
    """Image numbers of each batch: whole families, at first only of scenes with a single thing."""
    rng = random.Random(0)
    everything = range(len(images) // FAMILY)
    single = [f for f in everything if len(images[f * FAMILY].scene.things) == 1]
    for step in range(steps):
        pool = single if step < SHARE_OF_SINGLE_THINGS * steps else everything
        chosen = rng.sample(pool, min(families, len(pool)))
        yield [f * FAMILY + i for f in chosen for i in range(FAMILY)]


def pretrain_language(world: Path, folder: Path, tokenizer: Tokenizer, steps: int, sizes: LlamaConfig | None = None):
    """Train a small chat model (of other ``sizes`` than the miniature's, if given) on the world's conversations in
    words; leave it in ``folder``, an official one. A run that was cut goes on from its last checkpoint."""
    torch.manual_seed(0)
    config = LlavaConfig(VISION, sizes or language_config(tokenizer), max_length=256)
    model = Llava(config, tokenizer)
    initialise(model.language)
    records = read_list(world / "text.json")
    examples = [make_text(record, tokenizer, config) for record in records]
    # records that begin with the same words share one copy of them; summaries begin without the chat template
    subjects = [(record["id"].split("-")[0], record["kind"] == "summary") for record in records]
    data = Dataset(group(examples, subjects), None, config)
    stage = LANGUAGE_STAGE
    options = Options(stage.lr, None, stage.batch_size, steps, optimizer="muon", save_every=500, log_every=50)
    run = folder.with_name(folder.name + ".run")
    done = progress(run)
    if done != "finished":
        train(model, stage, data, None, run, options, resume=done == "begun")
    save_language(load(run).language, tokenizer, folder)
    shutil.rmtree(run)


def make_text(record: dict, tokenizer: Tokenizer, config: LlavaConfig) -> Example:
    """A conversation, or, for a summary, bare text of which only the summary is learnt: what stage 1 will ask
    for, with image tokens in place of what is told."""
    if record["kind"] != "summary":
        return make_example(record, tokenizer, config, LANGUAGE_STAGE.template)
    told, summary = (turn["value"] for turn in record["conversations"])
    told_ids, summary_ids = tokenizer.encode(told), tokenizer.encode(f" {summary}\n", bos=False, prefix=False)
    labels = [IGNORE] * len(told_ids) + summary_ids
    return Example(np.array(told_ids + summary_ids, np.int32), np.array(labels, np.int32), ())


def language_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        tokenizer.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        rms_norm_eps=1e-5, max_position_embeddings=512,
    )  # fmt: skip


def initialise(language: Llama) -> None:
    """The language model's start: matrices that keep the size of what they are given (the usual 0.02 would be four
    times too small at this width: attention stays flat, and looking things up is learnt much later); zeros where they
    write to the stream, so that every layer begins by seeing the words themselves; large embeddings, so that what the
    layers add, and each step, changes them little."""
    for p in language.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    nn.init.normal_(language.embed_tokens.weight, std=0.5)
    for block in language.layers:
        for last in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.zeros_(last.weight)
