"""chat.py as people use it: a terminal, a pipe, one question, Ctrl-C, and everything that can be wrong."""

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import chat
from nanollava import checkpoint
from nanollava.error import Error
from nanollava.tokenizer import Tokenizer

PROGRAM = Path(__file__).parents[1] / "chat.py"
TEXT = "The ball is blue."


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_file) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_file)


@pytest.fixture(scope="module")
def folder(scripted_model, tmp_path_factory) -> Path:
    """A stage-2 checkpoint that answers everything with TEXT."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    checkpoint.save(scripted_model.says(TEXT, stage="stage2"), folder)
    return folder


@pytest.fixture(scope="module")
def stage_1(scripted_model, tokenizer, tmp_path_factory) -> Path:
    """A stage-1 checkpoint that captions everything with "A small ball"."""
    folder = tmp_path_factory.mktemp("weights") / "stage1"
    chain = [tokenizer.bos_id, *tokenizer.encode("A small ball", bos=False), 13, 50]
    checkpoint.save(scripted_model([chain], template="plain", stage="stage1"), folder)
    return folder


@pytest.fixture(scope="module")
def endless(scripted_model, tokenizer, tmp_path_factory) -> Path:
    """A checkpoint whose answers would fill a book: The ball is The ball is The ball is ..."""
    folder = tmp_path_factory.mktemp("weights") / "endless"
    colon = tokenizer.encode(" ASSISTANT:", bos=False, prefix=False)[-1]
    words = tokenizer.encode("The ball is", bos=False)
    checkpoint.save(scripted_model([[colon, *words, words[0]]], positions=30_000), folder)
    return folder


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (20, 16), "red").save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function (lines of input, *arguments) -> (status, output, errors) that runs chat.py in this process."""

    def run(lines: str, *arguments: object, stdin: type = io.TextIOWrapper) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", stdin(io.BytesIO(lines.encode())))
        status = chat.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def questions(monkeypatch) -> list[tuple[str, bool]]:
    """What reaches the model: the text and whether a picture comes with it. The answer is "Yes."."""
    from nanollava.generate import Chat

    said = []

    def fake(self: Chat, text: str) -> Iterator[str]:
        said.append((text, self.waiting is not None))
        self.waiting = None
        yield "Yes."

    monkeypatch.setattr(Chat, "say", fake)
    return said


# ---------------------------------------------------------------- questions and answers


def test_one_question_gets_one_answer(talk, folder, image):
    assert talk("", folder, "--image", image, "--ask", "What is this?") == (0, f"{TEXT}\n", "")


def test_a_pipe_gets_only_the_answers(talk, folder, image):
    lines = "What is this?\n\n   \r\nReally?\r\nAre you sure?"
    assert talk(lines, folder, "--image", image) == (0, f"{TEXT}\n" * 3, "")


def test_no_input_is_no_error(talk, folder):
    assert talk("", folder) == (0, "", "")


def test_without_an_image_it_is_a_conversation_in_text(talk, folder, questions):
    assert talk("Hello.\n", folder)[::2] == (0, "No --image was given: answered from the text alone.\n")
    assert questions == [("Hello.", False)]


def test_odd_bytes_in_a_pipe_do_no_harm(talk, folder, monkeypatch, capsys, questions):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What\xff?\n"), encoding="utf-8"))
    assert chat.main([str(folder)]) == 0
    assert questions == [("What\ufffd?", False)]


def test_the_options_reach_the_model(folder, monkeypatch, talk):
    seen = []
    original = chat.Talk.ask
    monkeypatch.setattr(chat.Talk, "ask", lambda self, text: seen.append(self.chat) or original(self, text))
    options = "--temperature 0.1 --top-p 0.9 --top-k 7 --max-new-tokens 3 --seed 5 --dtype bfloat16 --device cpu"
    status, output, _ = talk("", folder, "--ask", "What?", *options.split())
    sampling = vars(seen[0].sampling)
    assert (status, output) == (0, "The ball is\n")
    assert sampling == {"temperature": 0.1, "top_p": 0.9, "top_k": 7, "max_new_tokens": 3, "seed": 5}
    assert {parameter.dtype for parameter in seen[0].model.parameters()} == {torch.bfloat16}


def test_the_tower_may_come_from_another_folder(talk, folder, tmp_path, scripted_model):
    from safetensors.torch import load_file, save_file

    checkpoint.save_vision(checkpoint.load(folder).vision, tmp_path / "tower")
    bare = tmp_path / "bare"
    checkpoint.save(scripted_model.says(TEXT), bare)
    tensors = load_file(bare / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "vision_tower" not in k}, bare / "model.safetensors")
    assert talk("", bare, "--ask", "What?")[0] == 2
    assert talk("", bare, "--ask", "What?", "--vision", tmp_path / "tower")[:2] == (0, f"{TEXT}\n")


def test_the_miniature_comes_with_a_sample_image(talk, folder, image, questions, monkeypatch):
    monkeypatch.setattr(chat, "MINIATURE", folder)
    monkeypatch.setattr(chat, "SAMPLE", image)
    talk("", "--ask", "What is this?")
    talk("", folder, "--ask", "What is this?")
    monkeypatch.setattr(chat, "SAMPLE", image.parent / "gone.png")
    talk("", "--ask", "What is this?")
    assert [picture for _, picture in questions] == [True, True, False]


def test_weights_that_would_not_fit_are_loaded_at_half_the_size(folder, monkeypatch, talk):
    assert chat.fits(folder)
    numbers = sum(p.numel() for p in checkpoint.load(folder).parameters())
    for memory, fits in ((4 * numbers, False), (5 * numbers, True)):
        monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
        assert chat.fits(folder) == fits
    monkeypatch.setattr(chat, "fits", lambda *_: False)
    status, output, errors = talk("", folder, "--ask", "What?", "--device", "cpu")
    assert (status, output) == (0, f"{TEXT}\n")
    assert "bfloat16" in errors


# ---------------------------------------------------------------- commands


def test_image_begins_a_new_conversation(talk, folder, image, questions):
    lines = f"One?\nTwo?\n/image {image}\nThree?\nFour?\n"
    assert talk(lines, folder) == (0, "Yes.\n" * 4, "")
    assert [picture for _, picture in questions] == [False, False, True, False]


@pytest.mark.parametrize("written", ["{}", "'{}'", '"{}"', "  {}  ", "escaped"])
def test_names_of_images_as_terminals_write_them(talk, folder, image, questions, written):
    name = str(image).replace(" ", "\\ ") if written == "escaped" else written.format(image)
    assert talk(f"/image {name}\nWhat?\n", folder) == (0, "Yes.\n", "")
    assert questions == [("What?", True)]


def test_a_bad_image_is_one_line_and_the_talk_goes_on(talk, folder, image, questions):
    shown = "\n".join(f"/image {name}" for name in (image.parent / "none.png", PROGRAM, "~nobody-here/x.png"))
    lines = f"One?\n{shown}\nTwo?\n/reset\nThree?\n"
    status, output, errors = talk(lines, folder, "--image", image, stdin=Keyboard)
    assert (status, output.count("Yes.\n")) == (0, 3)
    assert len(errors.splitlines()) == 3 and "give the whole path" in errors.splitlines()[2]
    assert "none.png" in errors.splitlines()[0]
    assert "not an image" in errors.splitlines()[1]
    assert [picture for _, picture in questions] == [True, False, True]


def test_reset_forgets_the_turns_and_keeps_the_image(folder, image, monkeypatch, talk):
    seen = []
    original = chat.Talk.ask

    def ask(self: chat.Talk, text: str) -> None:
        seen.append((len(self.chat.messages), self.chat.waiting is not None))
        original(self, text)

    monkeypatch.setattr(chat.Talk, "ask", ask)
    talk("One?\nTwo?\n/reset\nThree?\n", folder, "--image", image)
    assert seen == [(0, True), (2, False), (0, True)]


def test_quit_leaves_at_once(talk, folder, questions):
    for command in ("/quit", "/QUIT", "/exit"):
        assert talk(f"One?\n{command}\nTwo?\n", folder)[0] == 0
    assert [text for text, _ in questions] == ["One?"] * 3


def test_help_names_every_command(talk, folder):
    status, output, errors = talk("/help\n", folder)
    assert (status, errors) == (0, "")
    assert all(command in output for command in ("/image FILE", "/reset", "/help", "/quit", "Ctrl-C"))


def test_an_unknown_command_is_no_question(talk, folder, questions):
    status, output, errors = talk("/picture a.png\nWhat?\n", folder, stdin=Keyboard)
    assert status == 0 and "Yes.\n" in output
    assert errors == "/picture: no such command; /help lists them\n"
    assert questions == [("What?", False)]


def test_a_pipe_ends_at_the_first_line_that_fails(talk, folder, image, questions):
    """The next question might be about the picture that could not be shown."""
    for wrong in ("/image nowhere.png", "/picture a.png"):
        status, output, errors = talk(f"One?\n{wrong}\nTwo?\n", folder, "--image", image)
        assert (status, output) == (2, "Yes.\n")
        assert errors.startswith("error: ") and len(errors.splitlines()) == 1
    assert [text for text, _ in questions] == ["One?"] * 2


# ---------------------------------------------------------------- stage 1


def test_a_stage_1_checkpoint_says_what_it_is_and_captions(talk, stage_1, image):
    for lines, arguments, times in (("", ["--ask", "Who?"], 1), ("Who?\nWhy?\n", [], 2)):
        status, output, errors = talk(lines, stage_1, "--image", image, *arguments)
        assert (status, output) == (0, "A small ball\n" * times)
        assert len(errors.splitlines()) == 2
        assert "stage-1" in errors
        assert "captions" in errors


def test_a_stage_1_checkpoint_without_an_image_has_nothing_to_caption(talk, stage_1, image):
    status, output, errors = talk("", stage_1, "--ask", "Who?")
    assert (status, output) == (2, "")
    assert "give it an image" in errors
    status, output, errors = talk(f"Who?\n/image {image}\nWho?\n", stage_1, stdin=Keyboard)
    assert status == 0 and "A small ball\n" in output
    assert "give it an image" in errors


# ---------------------------------------------------------------- what can be wrong


def test_what_is_wrong_is_one_line_and_status_2(talk, folder, image, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = tmp_path / "cut.png"
    cut.write_bytes(b"")
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere: no such folder"),
        ([empty], "config.json: no such file"),
        ([folder, "--image", tmp_path / "none.png"], "none.png: the image does not exist"),
        ([folder, "--image", cut], "cut.png: the image is an empty file"),
        ([folder, "--image", PROGRAM], "chat.py: not an image"),
        ([folder, "--image", image, "--ask", "  "], "question is empty"),
        ([folder, "--temperature", "-1"], "temperature is -1.0"),
        ([folder, "--max-new-tokens", "0"], "max_new_tokens is 0"),
        ([folder, "--ask", "What? " * 500], "positions"),
    ):
        status, output, errors = talk("What?\n", *arguments)
        assert (status, output, errors.count("\n")) == (2, "", 1), arguments
        assert message in errors


def test_wrong_settings_and_images_are_told_before_the_weights_are_read(talk, image, monkeypatch):
    monkeypatch.setattr(chat, "load", lambda args: pytest.fail("the weights were read"))
    assert talk("", "--top-p", "0")[0] == 2
    assert talk("", "--image", image.parent / "none.png")[0] == 2


def test_a_device_that_is_not_there(talk, folder, monkeypatch):
    def refuse(*_, device: str) -> None:
        raise AssertionError(f"no {device} here\nand more about it")

    monkeypatch.setattr(torch, "zeros", refuse)
    status, _, errors = talk("", folder, "--device", "cuda")
    assert (status, errors) == (
        2, "error: device cuda: not to be used here (no cuda here); leave it out or say cpu\n"
    )  # fmt: skip


def test_weights_without_a_tokenizer_cannot_chat(talk, scripted_model, tmp_path):
    checkpoint.save(scripted_model.says(TEXT), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    status, _, errors = talk("", tmp_path / "model", "--ask", "What?")
    assert status == 2
    assert "tokenizer.model" in errors


def test_an_error_in_the_middle_does_not_end_the_talk(talk, folder):
    status, output, errors = talk("What? \n" + "What? " * 500 + "\nWhat?\n", folder, stdin=Keyboard)
    assert (status, output.count(f"{TEXT}\n")) == (0, 2)
    assert "positions" in errors


def test_running_out_of_memory_is_one_line(talk, folder, monkeypatch):
    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(chat.Talk, "ask", full)
    status, _, errors = talk("", folder, "--ask", "What?")
    assert (status, errors.count("\n")) == (2, 1)
    assert "out of memory" in errors


@pytest.mark.parametrize("kind", ["name too long", "loop"])
def test_a_path_that_leads_nowhere_is_one_line(talk, tmp_path, kind):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = tmp_path / "loop" if kind == "loop" else tmp_path / ("x" * 300)
    status, _, errors = talk("", folder, "--ask", "What?")
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: ") and str(folder)[:50] in errors


def test_faults_of_the_program_are_not_hidden(talk, folder, monkeypatch):
    monkeypatch.setattr(chat.Talk, "ask", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        talk("", folder, "--ask", "What?")


# ---------------------------------------------------------------- the real program


PATIENCE = 300  # seconds, on a machine that is busy with other things


def heed_ctrl_c() -> None:
    """A shell starts what runs in the background deaf to SIGINT, and with it these tests and their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Program:
    """chat.py in a process of its own, on pipes or on a pseudo-terminal."""

    def __init__(self, *arguments: object, terminal: bool = False):
        self.ours, theirs = os.openpty() if terminal else (None, subprocess.PIPE)
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}, preexec_fn=heed_ctrl_c,
        )  # fmt: skip
        self.theirs = theirs if terminal else None
        self.unread = ""

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        for end in filter(None, (self.ours, self.theirs)):
            os.close(end)

    def type(self, text: str) -> None:
        os.write(self.ours or self.process.stdin.fileno(), text.encode())

    def read_until(self, expected: str) -> str:
        """What the program shows, up to the expected text."""
        end, limit = self.ours or self.process.stdout.fileno(), time.monotonic() + PATIENCE
        while expected not in self.unread:
            waiting = select.select([end], [], [], max(0, limit - time.monotonic()))[0]
            assert waiting, f"{expected!r} not in {self.unread!r}"
            new = os.read(end, 65536).decode()
            assert new, f"the program ended; {expected!r} not in {self.unread!r}"
            self.unread += new
        seen, _, self.unread = self.unread.partition(expected)
        return seen

    def press_ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def status(self) -> int:
        return self.process.wait(PATIENCE)


def test_from_the_command_line(folder, image):
    with Program(folder, "--image", image, "--ask", "What is this?") as program:
        output, errors = program.process.communicate(timeout=PATIENCE)
        assert (program.status(), output.decode().splitlines(), errors) == (0, [TEXT], b"")


def test_help_needs_no_torch():
    code = "import chat, sys\ntry: chat.main(['--help'])\nfinally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stdout.startswith("usage: python chat.py [FOLDER] [--image FILE] [--ask TEXT]")
    assert found.stdout.endswith("\nFalse\n")


def test_ctrl_c_ends_the_answer_only_and_a_closed_pipe_is_quiet(endless):
    with Program(endless, "--max-new-tokens", 25_000) as program:
        for question in ("One?\n", "Two?\n"):
            program.type(question)
            program.read_until("The ball is The ball")
            program.press_ctrl_c()
            assert set(program.read_until("\n").split()) <= {"The", "ball", "is"}
        program.type("Three?\n")
        program.read_until("The ball")
        program.process.stdout.close()  # the reader goes away in the middle of an answer
        assert program.status() == 1
        assert program.process.stderr.read() == b""


class Keyboard(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_who_sits_at_a_terminal_is_greeted_and_prompted(talk, folder, image):
    lines = f"What?\n/reset\n/image\n/image\t{image}\n/image\n"  # and then the end: Ctrl-D
    status, output, errors = talk(lines, folder, stdin=Keyboard)
    assert (status, errors) == (0, "")
    assert "million parameters on cpu" in output.splitlines()[0]
    assert output.splitlines()[1] == "No image yet: /image FILE shows one."
    assert output.count("> ") == 6
    assert f"> {TEXT}\n> The conversation starts anew.\n> No image yet" in output
    assert output.count(f"> Looking at {os.path.relpath(image)}.\n") == 2
    assert output.endswith("> \n")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals on this system")
def test_a_conversation_at_a_terminal_with_ctrl_c(endless, image):
    with Program(endless, "--image", image, "--max-new-tokens", 25_000, terminal=True) as program:
        assert "Looking at" in program.read_until("> ")
        program.type("What is this?\n")
        program.read_until("The ball is The ball")
        program.press_ctrl_c()
        program.read_until("\n> ")
        program.type("/picture\n")
        program.read_until("no such command")
        program.read_until("> ")
        program.type("Wh")
        program.read_until("Wh")
        time.sleep(0.3)  # after the echo it waits for the next key
        program.press_ctrl_c()
        assert program.status() == 0


def test_the_names_that_the_package_promises():
    import nanollava

    for name in nanollava.PUBLIC:
        assert name in dir(nanollava)
        assert getattr(nanollava, name).__module__.startswith("nanollava.") if name != "TEMPLATES" else True
    assert nanollava.Error is Error
    assert "vicuna_v1" in nanollava.TEMPLATES
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nanollava.no_such_name
