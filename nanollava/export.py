"""A LLaVA for others to read: in the official layout, or as transformers' LlavaForConditionalGeneration (llava-hf) with
what its processor needs."""

import functools
import shutil
from pathlib import Path

import torch

from nanollava import config as fields
from nanollava import folder as files
from nanollava import images, layouts
from nanollava.checkpoint import load, save, tokenizer_config
from nanollava.conversation import TEMPLATES, get_template
from nanollava.error import Error
from nanollava.llava import Llava
from nanollava.places import language_folder
from nanollava.weights import write_named

# for transformers' apply_chat_template: conversation.py's layout of Vicuna. What is shown stands in front of the words.
CHAT_TEMPLATE = """\
{{ %r }}
{%%- for message in messages %%}
{{- " %s: " if message["role"] == "user" and loop.first else "%s: " if message["role"] == "user" else " %s: " }}
{%%- if message["content"] is string %%}
{{- message["content"] }}
{%%- else %%}
{%%- for part in message["content"] if part["type"] == "image" %%}
{{- "<image>\\n" }}
{%%- endfor %%}
{%%- for part in message["content"] if part["type"] == "text" %%}
{{- part["text"] }}
{%%- endfor %%}
{%%- endif %%}
{{- "</s>" if message["role"] == "assistant" }}
{%%- endfor %%}
{{- " %s:" if add_generation_prompt }}
"""


def export(
    source: Path,
    target: Path,
    kind: str,
    dtype: torch.dtype | None = None,
    vision: Path | None = None,
    base: Path | None = None,
) -> None:
    """Write any LLaVA that ``load`` reads as ``kind``, "llava-hf" or "llava".

    dtype None keeps the one that its weights are stored in; where they are stored in several, it is the narrowest that
    holds all. An image tower from another folder is rounded to it.
    Raises Error as ``load`` does, and where llava-hf, which knows only v1.5, lacks what the model has: a linear
    projector, tokens around its images.
    """
    check_new(target, source)
    model = load(source, dtype=dtype or stored_dtype(files.last_good(source), base), vision=vision, base=base)
    if kind == "llava":
        save(model, target)
        return
    if model.config.projector_type != "mlp2x_gelu":
        known = "llava-hf knows only mlp2x_gelu (train.py --projector); --as llava takes it"
        raise Error(f"{source}: its projector is {model.config.projector_type}; {known}")
    if model.config.use_im_start_end:
        raise Error(f"{source}: its images stand between <im_start> and <im_end>, which llava-hf does not know")
    with files.atomic_folder(target) as new:
        write_llava_hf(model, new)


def check_new(target: Path, *sources: Path) -> None:
    """Raises Error where no new folder can be made, or a source is none."""
    for source in sources:
        if not files.last_good(source).is_dir():
            raise Error(f"{source}: no such folder; check the path")
    target = target.resolve()  # x/../y is y even where there is no x
    if inside := [source for source in sources if source.resolve() in target.parents]:
        raise Error(f"{target}: lies in {inside[0]}, which it is made from; choose a folder outside")
    files.check_writable(target)
    if target.exists():
        raise Error(f"{target} exists: choose another folder")


def stored_dtype(folder: Path, base: Path | None = None) -> torch.dtype | None:
    """The dtype that holds all weights of a folder, or of its base, tables that every model computes anew apart; None
    without any. Reads no weights: they are opened, and never looked at."""
    if (place := language_folder(folder, base)) != folder:
        return stored_dtype(place)
    stored = {
        tensor.dtype
        for file in files.weight_files(folder)
        for name, tensor in files.tensors(file)
        if tensor.is_floating_point() and tensor.itemsize > 1 and not name.endswith(layouts.PASSED_OVER)
    }
    return functools.reduce(torch.promote_types, stored) if stored else None


def write_llava_hf(model: Llava, folder: Path) -> None:
    """The files of a llava-hf folder: weights, config, and what its processor needs. <image> and <pad> get the two ids
    behind the vocabulary, which is then filled up to a multiple of 64 with rows that are the mean of all others: so
    none of them is ever the likeliest token."""
    V, dtype = model.config.language.vocab_size, model.language.norm.weight.dtype
    rows = -(-(V + 2) // 64) * 64
    tensors = model.state_dict()
    for name in ("language.embed_tokens.weight", "language.lm_head.weight"):
        mean = tensors[name].float().mean(dim=0).to(dtype)
        tensors[name] = torch.cat([tensors[name], mean.expand(rows - V, -1)])
    write_named(tensors, folder, layouts.LLAVA_HF, dtype)
    settings = {"config.json": fields.llava_hf_fields(model.config, dtype, V, rows), **processor(model)}
    if model.tokenizer:
        shutil.copyfile(model.tokenizer.file, folder / "tokenizer.model")
        settings |= tokenizer_settings(model, V)
        template = get_template(model.config.template)
        if template.layout is TEMPLATES["vicuna_v1"].layout:
            words = template.system, template.user, template.user, template.assistant, template.assistant
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE % words, encoding="utf-8")
    for name, content in settings.items():
        files.write_json(folder / name, content)


def processor(model: Llava) -> dict[str, dict]:
    """preprocessor_config.json and processor_config.json: how transformers makes pixels, and widens <image>."""
    S, pad = model.config.vision.image_size, model.config.image_aspect_ratio == "pad"
    pixels = {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        **({"do_pad": True} if pad else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": S},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": S, "width": S},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.MEAN,
        "image_std": images.STD,
    }
    words = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": model.config.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return {"preprocessor_config.json": pixels, "processor_config.json": words}


def tokenizer_settings(model: Llava, image_token: int) -> dict[str, dict]:
    """tokenizer_config.json and added_tokens.json, with <image> and <pad> besides the tokens added before."""
    added = model.tokenizer.added | {"<image>": image_token, "<pad>": image_token + 1}
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = {
        **tokenizer_config(model.tokenizer, model.config.max_length),
        "pad_token": "<pad>",
        "added_tokens_decoder": {str(i): {"content": name, **special} for name, i in added.items()},
    }
    return {"tokenizer_config.json": config, "added_tokens.json": added}
