"""python tests/golden/make.py

Makes the folders beside this file: tiny random networks as transformers and PEFT save them, in the layouts that are
read here, each with what it computes. So these layouts are checked where neither of the two is installed
(test_golden.py). Needs `pip install .[oracle]`.
"""

import json
import shutil
from pathlib import Path

import peft
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
VISION = {
    "image_size": 12, "patch_size": 4, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 3,
    "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}  # fmt: skip
IMAGE, N = 45, 9
PIXELS = torch.linspace(-2, 2, 2 * 3 * 12 * 12).sin().view(2, 3, 12, 12)
IDS = [1, IMAGE, 5, 6, IMAGE, 7, 8]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OFFICIAL = {
    "model_type": "llava", "rope_theta": 500.0, "mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2,
    "_name_or_path": "lmsys/llama", **{name: value for name, value in TEXT.items() if name != "rope_parameters"},
}  # fmt: skip
SENTENCE = "A chat between a curious user and an assistant. What is this?"


def drawn(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def keep(name: str, **expected: torch.Tensor) -> None:
    """What the network of a folder computes, beside its files; what is no part of a checkpoint goes."""
    save_file({what: value.contiguous() for what, value in expected.items()}, HERE / name / "expected.safetensors")
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    (HERE / name / "README.md").unlink(missing_ok=True)


def clip() -> None:
    """A whole CLIP in one .bin, and its tower alone in safetensors."""
    text = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 9, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text | {"num_hidden_layers": 1})
    config.text_config.max_position_embeddings = 5
    whole = drawn(transformers.CLIPModel(config))
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in whole.state_dict().items()
                           if k.startswith("vision_model.")})  # fmt: skip
    features = tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
    for name, model in (("clip", whole), ("clip-tower", tower)):
        model.save_pretrained(HERE / name)
        keep(name, features=features)
    torch.save(load_file(HERE / "clip/model.safetensors"), HERE / "clip/pytorch_model.bin")
    (HERE / "clip/model.safetensors").unlink()


def llama() -> None:
    """A decoder in shards, and a LoRA over it."""
    model = drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    model.save_pretrained(HERE / "llama", max_shard_size="20KB")
    ids = torch.tensor([[1, 5, 44, 7, 33]])
    keep("llama", logits=model(ids).logits)
    adapted = adapt(model, "lora", ["q_proj", "down_proj"], r=2, lora_alpha=3)
    keep("lora", logits=adapted(ids).logits)


def adapt(model, name: str, targets: list[str], **settings):
    """A decoder with the adapters that a folder then has. PEFT holds the targets in a set: they get their order."""
    settings = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(HERE / name, save_embedding_layers=False)
    file = HERE / name / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}, indent=2))
    return adapted


def llava() -> None:
    """llava-hf's names, those of newer versions, and the authors' own, whose tower is in clip/."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )  # fmt: skip
    model = drawn(transformers.LlavaForConditionalGeneration(config))
    tower = load_file(HERE / "clip-tower/model.safetensors")
    model.model.vision_tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in tower.items()})
    ids = torch.tensor([[t for token in IDS for t in ([IMAGE] * N if token == IMAGE else [token])]])
    logits = model(input_ids=ids, pixel_values=PIXELS).logits
    words = model.generate(
        input_ids=ids, pixel_values=PIXELS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, ids.shape[1] :]
    model.save_pretrained(HERE / "llava-new", save_original_format=False)
    model.save_pretrained(HERE / "llava-hf")
    tensors = load_file(HERE / "llava-hf/model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    save_file(named, HERE / "llava-hf/model.safetensors", metadata={"format": "pt"})
    official = {}
    for name, tensor in tensors.items():
        for theirs, authors in (("language_model.", ""), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
                                ("multi_modal_projector.linear_2", "model.mm_projector.2")):  # fmt: skip
            if name.startswith(theirs):
                official[authors + name.removeprefix(theirs)] = tensor
    (HERE / "llava").mkdir()
    torch.save(official, HERE / "llava/pytorch_model.bin")
    settings = {k: v for k, v in TEXT.items() if k != "rope_parameters"} | {
        "model_type": "llava", "rope_theta": 500.0, "mm_vision_tower": "openai/clip", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_hidden_size": 10, "image_aspect_ratio": "pad",
    }  # fmt: skip
    (HERE / "llava/config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in ("llava-hf", "llava-new", "llava"):
        keep(name, logits=logits, words=words)


def joined(language, projector, image: list[int]) -> dict[str, torch.Tensor]:
    """Logits and words of the tower in clip-tower/, a projector and a decoder; ``image``: what stands for an image,
    IMAGE for its patches."""
    tower = transformers.CLIPVisionModel.from_pretrained(HERE / "clip-tower").eval()
    images = iter(projector(tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]))
    embedding = language.get_input_embeddings()
    ids = [t for token in IDS for t in (image if token == IMAGE else [token])]
    row = torch.cat([next(images) if token == IMAGE else embedding(torch.tensor([token])) for token in ids])[None]
    logits, words = language(inputs_embeds=row).logits, []
    for _ in range(6):
        words.append(language(inputs_embeds=row).logits[0, -1].argmax())
        row = torch.cat([row, embedding(words[-1]).view(1, 1, -1)], dim=1)
    return {"logits": logits, "words": torch.stack(words)}


def write(name: str, file: str, tensors: dict[str, torch.Tensor], **fields) -> None:
    """A folder of the authors: its config, whose fields may be None to be left out, and one .bin file."""
    (HERE / name).mkdir(exist_ok=True)
    torch.save(tensors, HERE / name / file)
    config = {field: value for field, value in (OFFICIAL | fields).items() if value is not None}
    (HERE / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def first_release(name: str, *added: str) -> None:
    """v0 and v1: tokens added behind the vocabulary of llama/, two of them around each image. A delta holds what its
    decoder has more than llama/."""
    more = {token: TEXT["vocab_size"] + number for number, token in enumerate(added)}
    rows = {"vocab_size": TEXT["vocab_size"] + len(more)}
    projector = torch.nn.Linear(10, 24)
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | rows))
    drawn(torch.nn.ModuleList([projector, language]))
    tensors = {f"model.mm_projector.{part}": tensor for part, tensor in projector.state_dict().items()}
    tensors |= {part: tensor.clone() for part, tensor in language.state_dict().items()}
    if name == "delta":
        for part, tensor in transformers.LlamaForCausalLM.from_pretrained(HERE / "llama").state_dict().items():
            tensors[part][: len(tensor)] -= tensor
    write(name, "pytorch_model.bin", tensors, **rows, _name_or_path=None, mm_use_im_start_end=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE]), model_prefix=str(HERE / name / "tokenizer"), model_type="bpe",
        vocab_size=TEXT["vocab_size"], normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (HERE / name / "tokenizer.vocab").unlink()
    (HERE / name / "added_tokens.json").write_text(json.dumps(more, indent=2) + "\n")
    keep(name, **joined(language, projector, [more["<im_start>"], IMAGE, more["<im_end>"]]))


def over_base() -> None:
    """Over the decoder in llama/: a projector alone, and a LoRA run of all matrices with its own."""
    language = transformers.LlamaForCausalLM.from_pretrained(HERE / "llama").eval()
    linear = drawn(torch.nn.Linear(10, 24))
    tensors = {f"model.mm_projector.{part}": tensor for part, tensor in linear.state_dict().items()}
    write("stage1", "mm_projector.bin", tensors, mm_projector_type="linear")
    keep("stage1", **joined(language, linear, [IMAGE]))
    mlp = drawn(torch.nn.Sequential(torch.nn.Linear(10, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)))
    tensors = {f"base_model.model.model.mm_projector.{part}": tensor for part, tensor in mlp.state_dict().items()}
    write("lora-run", "non_lora_trainables.bin", tensors, mm_projector_type="mlp2x_gelu")
    language.name_or_path = "lmsys/llama"  # PEFT writes it down as the base
    adapted = adapt(language, "lora-run", LINEAR, r=3, lora_alpha=7, lora_dropout=0.05, task_type="CAUSAL_LM")
    keep("lora-run", **joined(adapted, mlp, [IMAGE]))


if __name__ == "__main__":
    for folder in (path for path in HERE.iterdir() if path.is_dir()):
        shutil.rmtree(folder)
    with torch.no_grad():
        clip()
        llama()
        llava()
        first_release("llava-v0", "[PAD]", "<im_patch>", "<im_start>", "<im_end>")
        first_release("delta", "<im_patch>", "<im_start>", "<im_end>")
        over_base()
