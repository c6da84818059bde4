"""The step of decoding: with fixed shapes and compiled it says what it says as PyTorch runs it."""

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.exc import InductorError

from nanollava import attention, decoding, generate
from nanollava.attention import can_compile
from nanollava.decoding import FixedCache, compile_decoding, next_logits
from nanollava.generate import Sampling
from nanollava.llama import Cache, Llama, LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.tokenizer import IMAGE_TOKEN_ID as I
from nanollava.vit import VisionConfig

VISION = VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
LANGUAGE = LlamaConfig(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=120,
)
PROMPTS = [[1, 50, 51, 52, 53], [1, 50, I, 60], [1, I, 60, 61, I, 62, 63, 64], [1, 90], [1, 40, 41, I]]
needs_compiler = pytest.mark.skipif(not can_compile("cpu"), reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture
def model() -> Llava:
    torch.manual_seed(0)
    model = Llava(LlavaConfig(VISION, LANGUAGE)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than usual, so that what stands far back still changes the logits
            parameter.data.normal_(std=0.15)
    return model


def filled(language: Llama, rows: int, length: int, capacity: int) -> Cache:
    cache = Cache(language.config, rows, capacity, torch.device("cpu"), torch.float32)
    language.hidden(embeddings(rows, length), cache=cache)
    return cache


def embeddings(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, LANGUAGE.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padding", [None, [0, 3, 7]])
@torch.inference_mode()
def test_a_fixed_cache_gives_the_logits_of_a_growing_one(model, padding):
    language, rows = model.language, 3
    padding = None if padding is None else torch.tensor(padding)
    growing, fixed = (Cache(LANGUAGE, rows, 20, torch.device("cpu"), torch.float32) for _ in range(2))
    first = [next_logits(language, embeddings(rows, 9), cache, padding) for cache in (growing, fixed)]
    assert torch.equal(*first)
    fixed = FixedCache(fixed)
    for step in range(11):  # to the last position there is room for
        x = embeddings(rows, 1, seed=step + 2)
        expected = next_logits(language, x, growing, padding)
        found = next_logits(language, x, fixed, padding)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert int(fixed.length) == growing.length == 10 + step


@torch.inference_mode()
def test_what_is_not_filled_is_not_seen(model):
    clean, dirty = (FixedCache(filled(model.language, 2, 5, 12)) for _ in range(2))
    for kept in (*dirty.keys, *dirty.values):
        kept[:, :, 6:] = 1e4
    x = embeddings(2, 1)
    assert torch.equal(*(next_logits(model.language, x, cache) for cache in (clean, dirty)))


@torch.inference_mode()
def test_a_step_of_fixed_shapes_is_one_program_for_all_lengths_and_capacities(model):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(next_logits, backend=backend, fullgraph=True)
    for capacity in (9, 15, 32):
        cache = FixedCache(filled(model.language, 2, 5, capacity))
        for seed in range(4):
            step(model.language, embeddings(2, 1, seed), cache)
    assert len(graphs) == 1
    torch.compiler.reset()


@needs_compiler
def test_compiled_answers_are_those_of_the_plain_step(model):
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    cases = [(PROMPTS, pixels), (PROMPTS[:1], None), (PROMPTS[2:3], pixels[1:3])]
    sampling = Sampling(max_new_tokens=12)
    plain = [[answer.ids for answer in generate.generate(model, *case, sampling)] for case in cases]
    assert compile_decoding(model) is model and model.step is not None
    called, step = [], model.step
    model.step = lambda *given: called.append(len(given[1])) or step(*given)
    assert [[answer.ids for answer in generate.generate(model, *case, sampling)] for case in cases] == plain
    longest = [max(map(len, ids)) for ids in plain]
    assert longest == [12, 12, 12] and called == [5] * 11 + [1] * 22  # all but the first token of each


def test_without_a_compiler_it_says_so_once_and_answers_as_before(model, monkeypatch, capsys):
    monkeypatch.setattr(attention.shutil, "which", lambda name: None)
    can_compile.cache_clear()
    try:
        compile_decoding(model)
        compile_decoding(model)
    finally:
        can_compile.cache_clear()
    assert model.step is None
    assert capsys.readouterr().err.count("no C++ compiler found") == 1


@pytest.mark.parametrize("name", ["c++", "clang++"])
def test_a_compiler_that_inductor_does_not_look_for_is_named_to_it(name, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(attention.shutil, "which", lambda asked: "/bin/it" if asked == name else None)
    monkeypatch.setattr(attention, "compiles", lambda compiler: True)
    with inductor.patch({"cpp.cxx": (None, "g++")}):
        assert attention.find_cpp_compiler() and inductor.cpp.cxx == (None, name)


def test_a_compiler_that_is_broken_is_not_taken(tmp_path, monkeypatch):
    """Another one that works is; a compiler that CXX names is not replaced."""
    broken, working = tmp_path / "g++", tmp_path / "c++"
    for file, status in ((broken, 1), (working, 0)):
        file.write_text(f"#!/bin/sh\nexit {status}\n")
        file.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with inductor.patch({"cpp.cxx": (None, "g++")}):
        assert attention.find_cpp_compiler() and inductor.cpp.cxx == (None, "c++")
        monkeypatch.setenv("CXX", "g++")
        assert not attention.find_cpp_compiler()
    broken.write_bytes(b"\0\0")  # no program at all
    assert not attention.compiles(str(broken))


def test_a_step_that_cannot_be_compiled_after_all_is_run_as_before(model, monkeypatch, capsys):
    def backend(*_: object) -> None:
        raise InductorError(OSError(28, "No space left on device"), None)

    plain = [answer.ids for answer in generate.generate(model, PROMPTS[:2], torch.ones(1, 3, 16, 16))]
    monkeypatch.setattr(decoding, "can_compile", lambda device_type: True)
    compiler = torch.compile
    monkeypatch.setattr(decoding.torch, "compile", lambda function, options: compiler(function, backend=backend))
    torch.compiler.reset()
    compile_decoding(model)
    for _ in range(2):
        assert [a.ids for a in generate.generate(model, PROMPTS[:2], torch.ones(1, 3, 16, 16))] == plain
    said = capsys.readouterr().err
    assert said.count("cannot compile") == 1 and "No space left on device" in said and said.count("\n") == 2


def test_on_cuda_a_step_is_recorded_as_a_graph(model, monkeypatch):
    asked = {}
    monkeypatch.setattr(decoding, "can_compile", lambda device_type: True)
    monkeypatch.setattr(decoding.torch, "compile", lambda function, options: asked.update(options) or function)
    monkeypatch.setattr(Llava, "device", torch.device("cuda"))
    compile_decoding(model)
    assert asked == {"triton.cudagraphs": True} and model.step is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_gives_the_answers_of_the_plain_step(model):
    model.cuda()
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = [answer.ids for answer in generate.generate(model, PROMPTS, pixels, Sampling(max_new_tokens=12))]
    compile_decoding(model)
    for _ in range(3):  # a graph is recorded at the second call
        answers = generate.generate(model, PROMPTS, pixels, Sampling(max_new_tokens=12))
        assert [answer.ids for answer in answers] == plain


def test_maps_are_of_the_plain_step(model):
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a compiled step keeps no maps")

    model.step = refuse
    with attention.attention_maps() as maps:
        (answer,) = generate.generate(model, PROMPTS[:1], None, Sampling(max_new_tokens=4))
    assert [passed[0].shape[-1] for passed in maps] == [5, 6, 7, 8][: len(answer.ids)]
