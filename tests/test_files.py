"""JSON lines that are read, and files that are written whole."""

import json
import os
from pathlib import Path

import pytest

from nanollava.error import Error
from nanollava.files import check_apart, json_lines, plain_text, write_whole


def test_lines_are_read_whatever_ends_them_and_with_a_mark_of_byte_order(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n  \n{"b": 2}')
    assert list(json_lines(file)) == [(f"{file}, line 1", {"a": "\u2028"}), (f"{file}, line 4", {"b": 2})]
    file.write_text("")
    assert list(json_lines(file)) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": 1}\n{"a": 1', ", line 2: is not whole JSON"),
        (b"[" * 100_000, ", line 1: is not whole JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", ", line 1: is not whole JSON"),
        (b"\n[1]", ", line 2: holds a list, expected an object"),
        (b"\xff\xfe{}", ": is not UTF-8 text"),
        (None, ": cannot be read (No such file or directory); check the path"),
    ],
)
def test_lines_that_are_wrong_are_told_by_file_and_number(content, told, tmp_path):
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Error) as error:
        list(json_lines(file))
    assert str(error.value).startswith(f"{file}{told}")


def test_prose_is_read_without_marks_and_space_around_it(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\r\nQuestion:\r\nWhat? \r\n")
    assert plain_text(file, "write it") == "Question:\nWhat?"
    for content, told in (
        (b" \n", "is empty"),
        (b"\xe9", "cannot be read ('utf-8' codec"),
        (None, "cannot be read (No"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(Error) as error:
            plain_text(file, "write it")
        assert str(error.value).startswith(f"{file}: {told}") and str(error.value).endswith("; write it")
        file.touch()


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    def stopped(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Error, match=r"a.json: cannot be written \(No space left on device\)"):
        write_whole(file, "new")
    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "new")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(Error, match=r"cannot be written \(File name too long\)"):
        write_whole(tmp_path / ("n" * 250), "text")


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """Nor is /dev/null, by root."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Error, match=r"pipe: is no ordinary file; choose another name for --out"):
        write_whole(tmp_path / "pipe", "text")
    assert Path(tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_what_is_read_is_not_overwritten(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({}))
    (tmp_path / "link.json").symlink_to(file)
    check_apart(tmp_path / "b.json", file, None)
    for out in (file, tmp_path / "link.json", tmp_path / "." / "a.json"):
        with pytest.raises(Error, match=r"--out .*: is .*a.json, which is read; choose another name"):
            check_apart(out, None, tmp_path / "none.json", file)
