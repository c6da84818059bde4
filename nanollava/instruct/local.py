"""A language model in a folder as teacher: any that ``nanollava.load_language`` reads, in Vicuna's template."""

import zlib
from dataclasses import replace
from pathlib import Path

import torch

from nanollava.checkpoint import load_language
from nanollava.conversation import encode
from nanollava.folder import last_good
from nanollava.generate import generate
from nanollava.instruct.teacher import Reply, Request, Teacher, Unanswered
from nanollava.llava import Llava, LlavaConfig
from nanollava.sampling import Sampling
from nanollava.tokenizer import load_tokenizer, need_tokenizer
from nanollava.train.features import fingerprint
from nanollava.vit import VisionConfig

TEMPLATE = "vicuna_v1"


class LocalTeacher(Teacher):
    """temperature 0 takes the likeliest words; above it, each attempt at a key draws its own, the same in every run.

    Raises Error for a folder that cannot be read or has no tokenizer.
    """

    def __init__(self, folder: Path, temperature: float, max_tokens: int):
        self.temperature = temperature
        self.sampling = Sampling(temperature, max_new_tokens=max_tokens)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        language, tokenizer = load_language(folder, device), need_tokenizer(load_tokenizer(last_good(folder)))
        self.name = f"{last_good(folder).resolve().name} (a local model, weights {fingerprint(language)})"
        config = LlavaConfig(VisionConfig(), language.config, max_length=language.config.max_position_embeddings)
        with torch.device("meta"):  # generate takes a LLaVA; nobody will look at a picture
            self.model = Llava(config, tokenizer)
        self.model.language = language
        self.model.eval()

    def ask(self, request: Request) -> Reply:
        """Raises Unanswered where the prompt leaves no room for an answer."""
        prompt, _ = encode(turns(request.messages), self.model.tokenizer, TEMPLATE, images=0)
        if len(prompt) >= self.model.config.max_length:
            most = self.model.config.max_length
            raise Unanswered(f"its prompt takes {len(prompt)} positions, and the model has {most}", for_good=True)
        drawn = f"{request.key} {request.attempt}" if request.attempt else request.key
        sampling = replace(self.sampling, seed=zlib.crc32(drawn.encode()))
        (answer,) = generate(self.model, [prompt], None, sampling, TEMPLATE)
        return Reply(answer.text, len(prompt), len(answer.ids), cut=len(answer.ids) == answer.room)


def turns(messages: list[dict]) -> list[dict]:
    """Chat messages without a system message: Vicuna has its own, so what it said leads the first of the user's."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
