"""Text becomes token ids: a SentencePiece model, as LLaMA and Vicuna use it.

Two spacings exist. SentencePiece puts a space in front of what it is given, so that "cat" at the start of a text is the
same piece as " cat" inside it. Tokenizers marked `legacy` did so again behind every special token; newer ones do not.
After `</s>` the word "USER" is therefore two pieces (space-US, ER) in the first kind and one (USER) in the second, and
a model must be given what it was trained on.
"""

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from nanollava.error import Error
from nanollava.folder import read_json

IMAGE_TOKEN = "<image>"  # what a user writes where an image belongs
IMAGE_START_END = ("<im_start>", "<im_end>")  # what v0 and v1 put before an image, and behind it
IMAGE_TOKEN_ID = -200  # what stands there among the token ids; no row of the embedding has this number

# Two serialized protobuf messages in a row are one merged message, so these four bytes behind a model file
# set its `normalizer_spec.add_dummy_prefix` to false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A SentencePiece model with LLaMA's special tokens: `<unk>`, `<s>` (begin) and `</s>` (end).

    file: path of a `tokenizer.model`.
    legacy: whether text behind a special token gets the space in front again; see the top of this file.
    Raises Error when the file is missing, empty, no SentencePiece model, or one without begin and end tokens.
    """

    def __init__(self, file: str | Path, legacy: bool = True):
        self.file = Path(file)
        self.legacy = legacy
        model = _read_model(self.file)
        self._spaced = _parse_model(self.file, model)
        self._unspaced = _parse_model(self.file, model + NO_DUMMY_PREFIX)
        self.bos_id = self._spaced.bos_id()
        self.eos_id = self._spaced.eos_id()
        self.pad_id = self._spaced.unk_id()  # LLaMA has no padding token: `<unk>`, id 0, takes its place
        self.vocab_size = self._spaced.vocab_size()
        self.added: dict[str, int] = {}  # tokens that a checkpoint's authors added behind the vocabulary, and their ids
        self.image_ids = [IMAGE_TOKEN_ID]  # what stands for an image
        # SentencePiece reports a special token only when no text can produce it, which is what keeps turns unforgeable.
        if self.bos_id < 0 or self.eos_id < 0:
            raise Error(f"{self.file}: no control tokens <s> and </s> in it; give a LLaMA-style tokenizer.model")

    def enclose_images(self) -> None:
        """Let an image stand between <im_start> and <im_end>, as v0 and v1 were trained. Raises Error where these two
        are not among the added tokens."""
        ids = [self.added.get(token, 0) for token in IMAGE_START_END]
        if missing := [token for token, i in zip(IMAGE_START_END, ids, strict=True) if i < self.vocab_size]:
            asked = f"{' and '.join(missing)} missing, which config.json asks for (mm_use_im_start_end)"
            raise Error(f"{self.file.with_name('added_tokens.json')}: {asked}; fetch the file again")
        if ids[0] == ids[1]:
            raise Error(f"{self.file.with_name('added_tokens.json')}: {' and '.join(IMAGE_START_END)} have the same id")
        self.image_ids = [ids[0], IMAGE_TOKEN_ID, ids[1]]

    def encode(self, text: str, bos: bool = True, prefix: bool = True) -> list[int]:
        """Token ids of a text. Whatever looks like a special token or an image mark in it is plain text.

        bos: put the begin token in front.
        prefix: put the usual space in front of the text; False where the text goes on from what stands before it.
        """
        processor = self._spaced if prefix else self._unspaced
        ids = processor.encode(_valid_unicode(text))
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Begin, end, padding and image tokens, and rows behind the vocabulary, give no text.

        Bytes that are not (or not yet) a whole character become U+FFFD.
        """
        silent = {self.bos_id, self.eos_id, self.pad_id}
        return self._spaced.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in silent])


def need_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer, where there is one. Raises Error where there is none."""
    if tokenizer is None:
        raise Error("the model has no tokenizer, so it cannot read or write text: put tokenizer.model into its folder")
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.model`; `legacy` from `tokenizer_config.json`; the added tokens,
    and, from `config.json`, whether two of them stand around an image (v0 and v1).

    Without the second file, or that field in it, the old spacing (legacy) holds.
    Raises Error when the folder or the model is missing or broken, or one of the others is not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Error(f"{folder}: no such folder; give one that holds a tokenizer.model")
    tokenizer = Tokenizer(folder / "tokenizer.model", legacy=_legacy_flag(folder / "tokenizer_config.json"))
    tokenizer.added = _added_tokens(folder / "added_tokens.json")
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("mm_use_im_start_end"):
        tokenizer.enclose_images()
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, rows: int) -> None:
    """Raises Error where ids lack a row of the embedding, or rows an id.

    More rows than pieces are right where added_tokens.json beside the model names them, or where they pad the embedding
    to a multiple of 64.
    """
    size = max([tokenizer.vocab_size, *(i + 1 for i in tokenizer.added.values())])
    if size != rows and not (size < rows <= size + 64 and rows % 64 == 0):
        raise Error(
            f"{tokenizer.file}: {size} tokens, but the embedding has {rows} rows (vocab_size); use the tokenizer that "
            "the weights were trained with"
        )


def _added_tokens(file: Path) -> dict[str, int]:
    added = read_json(file) if file.is_file() else {}
    if not all(type(i) is int and i >= 0 for i in added.values()):
        raise Error(f"{file}: expected an object of tokens and their ids; download it again")
    return added


def _legacy_flag(file: Path) -> bool:
    """The field `legacy` of a tokenizer_config.json; True where the file or the field is absent or null."""
    if not file.exists():
        return True
    legacy = read_json(file).get("legacy")
    if legacy is not None and not isinstance(legacy, bool):
        raise Error(f"{file}: its field legacy is {legacy!r}; expected true or false")
    return legacy is not False


def _read_model(file: Path) -> bytes:
    """The bytes of a model file."""
    try:
        model = file.read_bytes()
    except OSError as error:
        raise Error(f"{file}: cannot be read ({error.strerror}); put a tokenizer.model there") from error
    if not model:
        raise Error(f"{file}: the file is empty; download or copy it again")
    return model


def _parse_model(file: Path, model: bytes) -> SentencePieceProcessor:
    """A SentencePiece processor from the bytes of its model."""
    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError) as error:
        raise Error(f"{file}: not a SentencePiece model, or damaged; download or copy it again") from error


def _valid_unicode(text: str) -> str:
    """The text with halves of surrogate pairs (JSON can hold them) joined, or U+FFFD where one is missing."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
