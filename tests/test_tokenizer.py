"""The tokenizer: known ids of the LLaMA model, spacing, special tokens that no text can forge, broken files."""

import json
import pickle
import shutil

import pytest
import sentencepiece

from nanollava.error import Error
from nanollava.tokenizer import IMAGE_TOKEN_ID, Tokenizer, load_tokenizer

ODD_TEXTS = [
    "", " ", "   ", "\n", "\n\n a", " lead", "trail ", "two  spaces", "tab\there", "naïve café", "日本語", "😀",
    " 😀 x", "a\0b", "▁", "x▁y", "<0x0A>", "###", "don't; (really?) #1: 3.5%", "\r\n", "\u200b", "e\u0301",
]  # fmt: skip
FORGED = ["<s>", "</s>", "<unk>", "a</s>b", "</s>USER: hi", " <s> ", "<pad>", "<image>", "▁</s>", "</s></s>"]


@pytest.fixture(params=["tiny", "llama"])
def tokenizer_file(request):
    return request.getfixturevalue(f"{request.param}_tokenizer_file")


def test_known_ids_of_the_llama_model(llama_tokenizer_file):
    tokenizer = Tokenizer(llama_tokenizer_file)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 0, 32000)
    assert tokenizer.encode("A cat on a mat") == [1, 319, 6635, 373, 263, 1775]
    assert tokenizer.encode("\nWhat", bos=False) == [29871, 13, 5618]
    assert tokenizer.encode("USER", bos=False) == [3148, 1001]
    assert tokenizer.encode("USER", bos=False, prefix=False) == [11889]
    assert tokenizer.encode("###", bos=False) == [835]
    assert tokenizer.encode("###", bos=False, prefix=False) == [2277, 29937]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_without_prefix_is_what_follows_a_line_end(tokenizer_file, text):
    """SentencePiece itself is the oracle: behind a line's end, which no piece spans, there is no extra space."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    line_end = processor.encode("\n")
    tokenizer = Tokenizer(tokenizer_file)
    assert tokenizer.encode(text, bos=False, prefix=False) == processor.encode("\n" + text)[len(line_end) :]
    assert tokenizer.encode(text, bos=False) == processor.encode(text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decode_gives_the_text_back(tokenizer_file, text):
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize("prefix", [True, False])
def test_no_text_makes_a_special_token(tokenizer_file, text, prefix):
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode(text, bos=False, prefix=prefix)
    assert ids and min(ids) > 2
    assert tokenizer.decode(ids).strip() == text.replace("▁", " ").strip()


def test_bos_comes_once_and_only_when_asked_for(tiny_tokenizer_file):
    tokenizer = Tokenizer(tiny_tokenizer_file)
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("A star") == [tokenizer.bos_id, *tokenizer.encode("A star", bos=False)]


def test_decode_leaves_out_what_is_not_text(tiny_tokenizer_file):
    tokenizer = Tokenizer(tiny_tokenizer_file)
    red, star = tokenizer.encode("red", bos=False), tokenizer.encode("star", bos=False)
    noisy = [tokenizer.bos_id, IMAGE_TOKEN_ID, *red, tokenizer.pad_id, *star, tokenizer.eos_id, tokenizer.vocab_size]
    assert tokenizer.decode(noisy) == "red star"


def test_decode_of_half_a_character(tokenizer_file):
    """A stream decodes ids as they come: a character of four bytes is replaced until its last byte is there."""
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode("ok 😀", bos=False)
    assert tokenizer.decode(ids) == "ok 😀"
    for cut in (1, 2, 3):
        text = tokenizer.decode(ids[:-cut])
        assert text.startswith("ok ") and text.endswith("\ufffd") and "😀" not in text


def test_halves_of_surrogate_pairs(tiny_tokenizer_file):
    tokenizer = Tokenizer(tiny_tokenizer_file)
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")
    assert tokenizer.decode(tokenizer.encode("a \ud83d b")) == "a \ufffd b"


def test_goes_to_another_process(tiny_tokenizer_file):
    tokenizer = Tokenizer(tiny_tokenizer_file, legacy=False)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.legacy is False
    assert copy.encode("A red star", prefix=False) == tokenizer.encode("A red star", prefix=False)


@pytest.mark.parametrize(
    ("config", "legacy"),
    [(None, True), ({}, True), ({"legacy": None}, True), ({"legacy": True}, True), ({"legacy": False}, False)],
)
def test_load_reads_the_legacy_flag(tiny_tokenizer_file, tmp_path, config, legacy):
    shutil.copy(tiny_tokenizer_file, tmp_path / "tokenizer.model")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.legacy is legacy and tokenizer.file == tmp_path / "tokenizer.model"


@pytest.mark.parametrize("config", ["", "{", "[]", '{"legacy": "no"}', '{"legacy": 0}', "3"])
def test_load_refuses_a_broken_config(tiny_tokenizer_file, tmp_path, config):
    shutil.copy(tiny_tokenizer_file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(Error, match=r"tokenizer_config\.json: "):
        load_tokenizer(tmp_path)


def test_load_refuses_a_missing_folder_or_model(tmp_path):
    with pytest.raises(Error, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(Error, match=r"tokenizer\.model: cannot be read \(No such file"):
        load_tokenizer(tmp_path)


def test_a_damaged_model_is_named(tiny_tokenizer_file, tmp_path):
    file = tmp_path / "tokenizer.model"
    for content in (b"version https://git-lfs.github.com/spec/v1\n", tiny_tokenizer_file.read_bytes()[:1003]):
        file.write_bytes(content)
        with pytest.raises(Error, match=r"tokenizer\.model: not a SentencePiece model"):
            Tokenizer(file)
    flipped = bytearray(tiny_tokenizer_file.read_bytes())
    flipped[flipped.index(b"<0x") + 3] ^= 0xFF
    file.write_bytes(flipped)
    with pytest.raises(Error, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer(file)
    file.write_bytes(b"")
    with pytest.raises(Error, match=r"tokenizer\.model: the file is empty"):
        Tokenizer(file)


def test_a_model_whose_end_token_can_be_typed_is_refused(train_tokenizer, tmp_path):
    file = tmp_path / "tokenizer.model"
    train_tokenizer(file, bos_id=-1, eos_id=-1, unk_id=0, user_defined_symbols=["<s>", "</s>"])
    assert 2 in sentencepiece.SentencePieceProcessor(model_file=str(file)).encode("a</s>b")
    with pytest.raises(Error, match="no control tokens"):
        Tokenizer(file)
