"""What official runs left that is no whole v1.5 model: v0 and v1, deltas, LoRA runs, a projector alone. The folders are
made of what transformers and PEFT save, and must give the numbers of their networks, joined here by hand."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn

from nanollava import convert
from nanollava.checkpoint import load
from nanollava.generate import Sampling, generate
from nanollava.llava import Llava
from nanollava.tokenizer import IMAGE_TOKEN_ID as IMAGE

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install .[oracle]")

from tests.oracle.test_checkpoint import TOLERANCE, drawn, error, every_size, noise, sizes  # noqa: E402  (needs it too)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all that official runs adapt
LATER = ("num_key_value_heads", "rope_parameters", "max_position_embeddings", "tie_word_embeddings")  # than v1
SENTENCE = "A chat between a curious user and an assistant. What is this? The small red star, it says."
both_projectors = pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])


class Reference:
    """CLIP's tower and a LLaMA of transformers with a projector between them."""

    def __init__(self, vision: dict, text: dict, kind: str):
        self.vision, self.text, self.kind = vision, text, kind
        C, D = vision["hidden_size"], text["hidden_size"]
        linear = nn.Linear(C, D)
        self.tower = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)))
        self.projector = drawn(linear if kind == "linear" else nn.Sequential(linear, nn.GELU(), nn.Linear(D, D)))
        self.language = drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)))

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projector(self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])

    def logits_and_words(self, ids: list[int], pixels: torch.Tensor, count: int) -> tuple[torch.Tensor, list[int]]:
        """Logits of a prompt whose images stand at IMAGE, and the likeliest tokens behind it, one by one."""
        images, embedding = iter(self.image_tokens(pixels)), self.language.get_input_embeddings()
        row = torch.cat([next(images) if token == IMAGE else embedding(torch.tensor([token])) for token in ids])[None]
        logits, words = self.language(inputs_embeds=row).logits, []
        for _ in range(count):
            words.append(self.language(inputs_embeds=row).logits[0, -1].argmax().item())
            row = torch.cat([row, embedding(torch.tensor([[words[-1]]]))], dim=1)
        return logits, words

    def named(self, prefix: str) -> dict[str, torch.Tensor]:
        """The projector's tensors as a file has them."""
        return {prefix + name: tensor for name, tensor in self.projector.state_dict().items()}

    def write(self, folder: Path, **fields) -> None:
        """The LLaVA's config.json as the official code wrote it, and the tower's folder beside it."""
        self.tower.save_pretrained(folder.parent / "clip-vit")
        text = {name: value for name, value in self.text.items() if name != "rope_parameters"}
        if "rope_parameters" in self.text:
            text["rope_theta"] = self.text["rope_parameters"]["rope_theta"]
        tower = {"mm_vision_tower": "openai/clip-vit", "mm_hidden_size": self.vision["hidden_size"]}
        folder.mkdir(exist_ok=True)
        config = {"model_type": "llava", **text, **tower, "mm_vision_select_layer": -2, **fields}
        (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def check(ours: Llava, theirs: Reference, image: tuple[int, ...] = (IMAGE,)) -> None:
    """The same features, logits and greedy words; ``image`` is what must stand for an image in a prompt."""
    pixels = noise(2, theirs.vision["image_size"])
    assert error(ours.image_tokens(pixels), theirs.image_tokens(pixels)) < TOLERANCE
    logits, words = theirs.logits_and_words([1, *image, 5, 6, *image, 7, 8], pixels, 6)
    image = ours.tokenizer.image_ids if ours.tokenizer else [IMAGE]
    ids = [1, *image, 5, 6, *image, 7, 8]
    assert error(ours(torch.tensor([ids]), pixels), logits) < TOLERANCE
    (found,) = generate(ours, [ids], pixels, Sampling(max_new_tokens=6), "vicuna_v1")
    assert found.ids == [*words, 2][: [*words, 2].index(2)]


# ---------------------------------------------------------------- v0 and v1, whole and as deltas

ADDED = {"v0": ("[PAD]", "<im_patch>", "<im_start>", "<im_end>"), "v1": ("<im_patch>", "<im_start>", "<im_end>")}


def first_release(seed: int, version: str) -> tuple[Reference, dict[str, int], int]:
    """A LLaMA whose vocabulary was widened, the tokens that were added, and how many there were before. What configs
    did not say then has its old value: as many key heads as heads, rope_theta 10,000."""
    vision, text = sizes(seed)
    pieces = text["vocab_size"]
    added = {token: pieces + number for number, token in enumerate(ADDED[version])}
    text = {name: value for name, value in text.items() if name not in LATER}
    return Reference(vision, text | {"vocab_size": pieces + len(added)}, "linear"), added, pieces


def publish(theirs: Reference, added: dict[str, int], folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A folder of the first releases around those tensors: two .bin shards, a tokenizer, no image tower."""
    theirs.write(folder, mm_use_im_start_end=True, bos_token_id=0, eos_token_id=1, use_mm_proj=True)
    tensors = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # old versions stored it
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE]), model_prefix=str(folder / "tokenizer"), vocab_size=min(added.values()),
        model_type="bpe", normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps(added))


@every_size
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_the_first_releases_give_the_numbers_of_a_widened_llama(version, seed, tmp_path):
    theirs, added, _ = first_release(seed, version)
    publish(theirs, added, tmp_path / "llava", theirs.language.state_dict() | theirs.named("model.mm_projector."))
    ours = load(tmp_path / "llava")
    assert ours.config.template == f"llava_{version}"
    check(ours, theirs, (added["<im_start>"], IMAGE, added["<im_end>"]))


@every_size
def test_a_delta_over_a_llama_that_transformers_saved_gives_the_numbers_of_its_sum(seed, tmp_path):
    theirs, added, pieces = first_release(seed, "v1")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**theirs.text | {"vocab_size": pieces}))
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    delta = {name: tensor.clone() for name, tensor in theirs.language.state_dict().items()}
    for name, tensor in base.state_dict().items():
        delta[name][: len(tensor)] -= tensor
    publish(theirs, added, tmp_path / "delta", delta | theirs.named("model.mm_projector."))
    assert convert.main(["apply-delta", *(str(tmp_path / name) for name in ("base", "delta", "sum"))]) == 0
    check(load(tmp_path / "sum"), theirs, (added["<im_start>"], IMAGE, added["<im_end>"]))


# ---------------------------------------------------------------- what was trained over a base


def run_over_base(seed: int, kind: str, folder: Path) -> Reference:
    """``folder`` with the config of an official run, clip-vit/ and vicuna/ beside it."""
    theirs = Reference(*sizes(seed), kind)
    theirs.write(folder, mm_projector_type=kind, _name_or_path="lmsys/vicuna", mm_use_im_start_end=False)
    theirs.language.save_pretrained(folder.parent / "vicuna")
    return theirs


@every_size
@both_projectors
def test_a_lora_run_gives_the_numbers_of_peft_s_side_branches(kind, seed, tmp_path):
    peft = pytest.importorskip("peft", reason="the reference implementation: pip install .[oracle]")
    theirs, rng = run_over_base(seed, kind, tmp_path / "run"), random.Random(seed)
    settings = peft.LoraConfig(
        r=rng.choice((2, 3, 5)), lora_alpha=rng.randrange(6, 12), target_modules=LINEAR, lora_dropout=0.05,
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    theirs.language.name_or_path = "lmsys/vicuna"  # PEFT writes it down as the base
    theirs.language = peft.get_peft_model(theirs.language, settings).eval()
    theirs.language.save_pretrained(tmp_path / "run", save_embedding_layers=False, safe_serialization=seed % 2 == 0)
    torch.save(theirs.named("base_model.model.model.mm_projector."), tmp_path / "run/non_lora_trainables.bin")
    ours = load(tmp_path / "run")
    assert (ours.config.template, ours.config.projector_type) == ("vicuna_v1", kind)
    check(ours, theirs)


@every_size
@both_projectors
def test_a_projector_alone_gives_the_numbers_of_its_base_with_it(kind, seed, tmp_path):
    theirs = run_over_base(seed, kind, tmp_path / "run")
    torch.save(theirs.named("model.mm_projector."), tmp_path / "run/mm_projector.bin")
    ours = load(tmp_path / "run")
    assert (ours.config.stage, ours.config.projector_type) == ("stage1", kind)
    check(ours, theirs)
