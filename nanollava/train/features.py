"""Patch features kept on disk: the vision tower is frozen (LLaVA section 4.2), so those of an image never change.

    DIR/FINGERPRINT/ab/abcdef...    N C numbers as they stand in memory, and their checksum

FINGERPRINT stands for the tower's weights and for all that makes pixels of a picture; the name of a file for an image's
path, size and time of change. So what does not belong to a run is never read: nothing has to be cleared by hand, and
several runs may share a folder.
"""

import hashlib
import os
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import PIL
import torch
from torch import Tensor, nn

from nanollava.error import Error
from nanollava.llava import Llava


class FeatureCache:
    """The patch features of images, from disk or, the first time, from the tower.

    They are computed one image at a time, so that no bit depends on which images came together (a matrix product of
    more rows may round otherwise), and kept in the dtype that the projector computes in: float32 on a CPU, bfloat16 on
    CUDA. From here on ``model.vision`` takes patch features in the place of pixels, and hands them on. Raises Error
    where ``folder`` cannot be written to.
    """

    def __init__(self, folder: Path, model: Llava):
        self.tower, self.config, self.device = model.vision, model.config, model.vision.pre_layrnorm.weight.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else model.vision.pre_layrnorm.weight.dtype
        self.shape = self.config.vision.num_patches, self.config.vision.hidden_size  # N, C
        self.size = self.shape[0] * self.shape[1] * self.dtype.itemsize  # bytes
        self.root, self.writing, self.lock = folder, True, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Error(f"--cache-features {folder}: {error.strerror}; choose another folder") from error
        model.vision.forward = lambda features, layer: features

    @cached_property
    def folder(self) -> Path:
        """That of this tower, and this way from a picture to pixels. First asked for when training has begun: --resume
        brings its own tower."""
        config = self.config
        what = asdict(config.vision), config.select_layer, config.image_aspect_ratio, PIL.__version__
        digest = hashlib.sha256(repr((*what, self.dtype, self.device.type)).encode())
        for tensor in self.tower.state_dict().values():
            digest.update(as_bytes(tensor))
        folder = self.root / digest.hexdigest()[:16]
        print(f"{folder}: patch features are kept here, {self.size / 1e6:.1f} MB for each image", flush=True)
        return folder

    def get(self, image: Path, pixels: Callable[[], Tensor | None]) -> Tensor | None:
        """(N, C) features of the image in a file; None where ``pixels``, which makes (3, S, S) of it, gives None."""
        if not os.path.exists(image):
            return pixels()  # says so
        entry = self.entry(image)
        features = self.read(entry)
        if features is None and (square := pixels()) is not None:
            features = self.compute(square)
            self.write(entry, features)
        return features

    def entry(self, image: Path) -> Path:
        """The file for the features of an image as it is now."""
        state = os.stat(image)
        key = os.fsencode(os.path.abspath(image)) + f"\0{state.st_size} {state.st_mtime_ns}".encode()
        name = hashlib.sha256(key).hexdigest()[:32]
        with self.lock:  # one of the workers asks for the folder first
            return self.folder / name[:2] / name

    @torch.no_grad()
    def compute(self, pixels: Tensor) -> Tensor:
        """(3, S, S) -> (N, C), as ``Llava.image_tokens`` has the tower do it in training."""
        pixels = pixels[None].to(self.device, self.tower.pre_layrnorm.weight.dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            state = self.tower.hidden_state(pixels, self.config.select_layer)
        return state[0, 1:].to(self.dtype).cpu()  # without the class token

    def read(self, entry: Path) -> Tensor | None:
        """None where there is nothing to read, or, with a line on stderr, where it is damaged."""
        try:
            content = bytearray(entry.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            content = bytearray()
        whole, check = content[: self.size], content[self.size :]
        if len(whole) < self.size or check != checksum(whole):
            print(f"{entry}: damaged; these features are computed again", file=sys.stderr)
            return None
        return torch.frombuffer(whole, dtype=self.dtype).view(self.shape)

    def write(self, entry: Path, features: Tensor) -> None:
        """Under another name first: a kill leaves no half file. The first failure, said in a line, is the last try."""
        if not self.writing:
            return
        draft = entry.with_name(f"{entry.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            content = as_bytes(features)
            draft.write_bytes(content + checksum(content))
            draft.replace(entry)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            with self.lock:
                if self.writing:
                    why = f"cannot be written ({error.strerror}): training goes on, keeping no more features"
                    print(f"{self.folder}: {why}", file=sys.stderr)
                self.writing = False


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def fingerprint(model: nn.Module) -> str:
    """Eight hexadecimal digits that tell other weights from these: a checksum of the first numbers of each tensor."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(as_bytes(tensor.flatten()[:256]), value)
    return f"{value:08x}"
