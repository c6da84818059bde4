"""What an official run leaves that is no whole model: a projector, perhaps adapters, and what they were trained over.

Shapes: D language width.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from nanollava import config as fields
from nanollava import folder as files
from nanollava.error import Error
from nanollava.layouts import PROJECTOR, PROJECTOR_WITH_START_END, Layout
from nanollava.llama import LlamaConfig


class Trained(NamedTuple):
    """The folder of a stage 1 or of a LoRA run."""

    folder: Path
    config: dict  # its config.json
    adapted: bool  # whether it holds adapters
    projector: Path  # the file with the projector
    language: LlamaConfig  # the sizes of the language model that it was trained with
    start_end: Tensor | None  # (2, D), the embedding of <im_start> and <im_end>, where it was trained too

    @property
    def layout(self) -> Layout:
        """What the tensors of the projector's file are called."""
        return PROJECTOR if self.start_end is None else PROJECTOR_WITH_START_END


def read_trained(folder: Path, config: dict) -> Trained:
    """What the folder with that config holds. Raises Error where its projector is missing."""
    adapted = (folder / "adapter_config.json").is_file()
    projector = folder / ("non_lora_trainables.bin" if adapted else "mm_projector.bin")
    if not projector.is_file():
        raise Error(f"{projector}: no such file; a LoRA run keeps its projector there, is the download complete?")
    language = fields.language_config(config, folder / "config.json")
    asked = config.get("mm_use_im_start_end")
    start_end = trained_start_end(projector, language.vocab_size) if asked else None
    return Trained(folder, config, adapted, projector, language, start_end)


def trained_start_end(projector: Path, size: int) -> Tensor | None:
    """(2, D) embedding of <im_start> and <im_end>, which the first releases trained together with the projector and
    stored beside it, alone or as the end of a whole matrix of ``size`` rows."""
    for name, tensor in files.tensors(projector):
        if name.endswith("embed_tokens.weight"):
            if tensor.ndim != 2 or len(tensor) not in (2, size):
                raise Error(f"{projector}: {name} is {tuple(tensor.shape)}, expected 2 rows or {size}; fetch it again")
            return tensor[-2:].clone()
    return None


def check_base(trained: Trained, base: Path, known: LlamaConfig) -> None:
    """Raises Error where the language model of a base, of sizes ``known``, is not the one that was trained over."""
    added = (0,) if trained.start_end is None else (2, 3)  # rows; <im_patch> may be the third
    for name, here in vars(trained.language).items():
        there = getattr(known, name)
        fits = [here - more for more in added] if name == "vocab_size" else [here]
        if there not in fits and name != "max_position_embeddings":
            was = f"{trained.folder} was trained over one with {' or '.join(map(str, fits))}"
            raise Error(f"{base}: {name} is {there}, but {was}; give its base")


def same_tower(one: dict, other: dict) -> bool:
    """Whether two configs name the same image tower, or one of them none."""
    names = [Path(name).name for config in (one, other) if isinstance(name := config.get("mm_vision_tower"), str)]
    return len(set(names)) < 2
