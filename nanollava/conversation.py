"""A conversation becomes token ids and labels (section 4.2 and table 2 of the paper).

A template turns the messages into segments: pieces of text, image marks and special tokens, each knowing whether the
model is to learn it. The prompt that people read, the ids that the model reads and the labels that the loss reads all
come from this one list, so they cannot disagree, whatever the messages say.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nanollava.error import Error
from nanollava.tokenizer import IMAGE_TOKEN, Tokenizer, need_tokenizer

IGNORE = -100  # the label of a token that carries no loss

Message = dict[str, str]  # {"role": "user" or "assistant", "content": text with an <image> where a picture belongs}

HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER_SYSTEM = HUMAN_SYSTEM.replace("human", "user")
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation. What is special is one token (`<s>`, `</s>` or `<image>`), never the text it shows."""

    text: str
    loss: bool = False
    special: bool = False


@dataclass(frozen=True)
class Template:
    """How one family of models writes a conversation.

    layout: messages and template -> segments, in which image marks are still text.
    stop: the text that ends an answer; None where the end token alone does.
    """

    layout: Callable[[list[Message], "Template"], list[Segment]]
    system: str = ""
    user: str = ""
    assistant: str = ""
    stop: str | None = None


BEGIN = Segment("<s>", special=True)
END = Segment("</s>", loss=True, special=True)  # learnt: it is how the model says that it is done


# Layouts. Two texts that touch are tokenized apart, so a layout may cut only where no token spans the cut: in front of
# the space after a word, and on either side of a line's end.


def _vicuna(messages: list[Message], template: Template) -> list[Segment]:
    """`SYSTEM USER: question ASSISTANT: answer</s>USER: ...`; answers and end tokens are learnt."""
    parts, lead = [], template.system + " "
    for message in messages:
        text = message["content"]
        if message["role"] == "user":
            question = f"{template.user}: {text} " if text else f"{template.user}:"
            parts.append(Segment(f"{lead}{question}{template.assistant}:"))
        else:
            parts += [Segment(" " + text, loss=True), END]
            lead = ""
    return parts


def _hashes(messages: list[Message], template: Template) -> list[Segment]:
    """The first release: `SYSTEM###Human: question###Assistant:` to ask, the layout below to learn."""
    if messages[-1]["role"] == "assistant":
        return _hashes_training(messages, template)
    names = {"user": template.user, "assistant": template.assistant}
    text = template.system + "###"
    for message in messages:
        content = message["content"]
        text += f"{names[message['role']]}: {content}###" if content else f"{names[message['role']]}:"
    # One text without loss: an answer's last sign and the ### behind it may share a token here.
    return [Segment(f"{text}{template.assistant}:")]


def _hashes_training(messages: list[Message], template: Template) -> list[Segment]:
    """`SYSTEM`, an empty line, lines `### Human: question` and `### Assistant: answer`, and `### ` at the end.

    Learnt are the assistant's lines as a whole and the `###` of the human's, which is where an answer has to stop.
    """
    parts = [Segment(template.system + "\n\n")]
    for message in messages:
        if message["role"] == "user":
            parts += [Segment("###", loss=True), Segment(f" {template.user}: {message['content']}\n")]
        else:
            parts.append(Segment(f"### {template.assistant}: {message['content']}\n", loss=True))
    return [*parts, Segment("### ", loss=True)]


def _plain(messages: list[Message], template: Template) -> list[Segment]:
    """Stage 1: the image, then its caption and a line's end; the caption is learnt. The question is dropped, as in the
    official code (the paper kept it): only the projector learns, and the caption is all there is to say."""
    marks = messages[0]["content"].count(IMAGE_TOKEN)
    if not marks or len(messages) > 2:
        needed = f"one user turn with an {IMAGE_TOKEN} mark and at most one answer"
        raise Error(f"template plain: it takes {needed}", "plain")
    captions = [Segment(message["content"] + "\n", loss=True) for message in messages[1:]]
    return [Segment(IMAGE_TOKEN * marks), *captions]


def _llama_2(messages: list[Message], template: Template) -> list[Segment]:
    """`[INST] <<SYS>> SYSTEM <</SYS>> question [/INST] answer </s><s>[INST] ...`, with LLaMA 2's line ends.

    Learnt are the answers, the space behind them and the end tokens.
    """
    parts, lead = [], f"<<SYS>>\n{template.system}\n<</SYS>>\n\n"
    for message in messages:
        if message["role"] == "user":
            begin = [BEGIN] if parts else []  # the first one is everybody's begin token
            parts += [*begin, Segment(f"[INST] {lead}{message['content']} [/INST]")]
            lead = ""
        else:
            parts += [Segment(f" {message['content']} ", loss=True), END]
    return parts


_VICUNA_V1 = Template(_vicuna, USER_SYSTEM, "USER", "ASSISTANT")
TEMPLATES = {
    "vicuna_v1": _VICUNA_V1,  # LLaVA v1.5, and the default here
    "v1": _VICUNA_V1,  # the same, as the official scripts call it
    "llava_v1": replace(_VICUNA_V1, system=HUMAN_SYSTEM),  # LLaVA v1
    "llava_v0": Template(_hashes, HUMAN_SYSTEM, "Human", "Assistant", stop="###"),  # the paper's table 2
    "plain": Template(_plain, stop="\n"),  # stage 1
    "llava_llama_2": Template(_llama_2, LLAMA_2_SYSTEM),  # LLaVA on Llama 2 chat
}


def encode(
    messages: list[Message], tokenizer: Tokenizer, template: str, images: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, IMAGE_TOKEN_ID at its images, and labels of the same length, IGNORE = no loss.

    messages: the user's and the assistant's in turn, the user first. After a last message of the user's the ids end
        where the assistant is to go on, without a space.
    template: a name in TEMPLATES.
    images: the number of pictures. None or 1: every message with marks keeps one, moved to its front, on its own line.
        More: as many marks as that, left where they are. 0: a mark is ordinary text.
    Raises Error on an unknown template, no messages, roles out of order, an empty answer, marks that are not as many
    as the images.
    """
    ids, labels = [need_tokenizer(tokenizer).bos_id], [IGNORE]
    prefix = True  # whether text gets the space in front: at the start, behind an image, and where legacy says so
    for segment in segments(messages, template, images):
        piece = _segment_ids(segment, tokenizer, prefix)
        ids += piece
        labels += piece if segment.loss else [IGNORE] * len(piece)
        # behind an image as at the start: the official code tokenizes what stands around its images one by one
        prefix = segment.special and (segment.text == IMAGE_TOKEN or tokenizer.legacy)
    return ids, labels


def render(messages: list[Message], template: str, images: int | None = None) -> str:
    """The conversation as one string to look at, without the begin token in front; arguments and errors of encode."""
    return "".join(segment.text for segment in segments(messages, template, images))


def segments(messages: list[Message], template: str, images: int | None = None) -> list[Segment]:
    """The segments of a conversation, none of them empty; arguments and errors of encode."""
    chosen, messages = get_template(template), list(messages)
    _check_turns(messages)
    if images in (None, 1):
        messages = [{**message, "content": _image_first(message["content"])} for message in messages]
    found = chosen.layout(messages, chosen)
    if images == 0:
        return found
    marks = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if images not in (None, 1, marks):
        raise Error(f"messages: {marks} {IMAGE_TOKEN} marks for {images} images; write one mark for each image")
    return [part for segment in found for part in _split_images(segment)]


def get_template(name: str) -> Template:
    """The template of that name. Raises Error that lists the names there are."""
    if name not in TEMPLATES:
        raise Error(f"template {name!r}: there is none of this name; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _segment_ids(segment: Segment, tokenizer: Tokenizer, prefix: bool) -> list[int]:
    """Token ids of one segment."""
    if not segment.special:
        return tokenizer.encode(segment.text, bos=False, prefix=prefix)
    return {BEGIN.text: [tokenizer.bos_id], END.text: [tokenizer.eos_id]}.get(segment.text, tokenizer.image_ids)


def _image_first(text: str) -> str:
    """A message with image marks keeps one, on a line of its own in front; any other is left as it is."""
    if IMAGE_TOKEN not in text:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _split_images(segment: Segment) -> Iterator[Segment]:
    """The segment cut at its image marks: texts as they were, marks as special tokens without loss."""
    if segment.special:
        yield segment
        return
    for number, text in enumerate(segment.text.split(IMAGE_TOKEN)):
        if number:
            yield Segment(IMAGE_TOKEN, special=True)
        if text:
            yield replace(segment, text=text)


def _check_turns(messages: list[Message]) -> None:
    """Raise Error unless user and assistant speak in turn, the user first, and no answer is empty."""
    if not messages:
        raise Error("messages: the list is empty; give at least one of the user's")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Error(f"messages[{number}].content: missing, or not text")
        _check_turn(f"messages[{number}]", number, message)


def _check_turn(place: str, number: int, message: Message, role: str = "role", content: str = "content") -> None:
    """Raise Error where a message is not of whose turn it is, or an empty answer; role, content: its fields' names."""
    expected = ("user", "assistant")[number % 2]
    if message.get("role") != expected:
        problem = f"this turn must be the {expected}'s; they alternate, the user first"
        raise Error(f"{place}.{role}: {problem}", "roles out of order")
    if expected == "assistant" and not message["content"].replace(IMAGE_TOKEN, "").strip():
        raise Error(f"{place}.{content}: the answer is empty; complete or remove this turn", "empty answer")


def images_from_record(record: dict) -> list[str]:
    """The image paths of an official record, as written in it: `image` is one path, a list of them, or absent.

    Raises Error naming the record when the field is anything else.
    """
    image = record.get("image")
    paths = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise Error(f"{_name(record)}: image: must be a path or a list of paths", "image name")
    return paths


def messages_from_record(record: dict) -> list[Message]:
    """The messages of an official record, {"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}.

    A first turn that is not the human's is left out, and so is a last question without an answer. Give
    `images=len(images_from_record(record))` to encode with them.
    Raises Error, naming the record and the field, for whatever could not be learnt from: wrong types, no turns,
    no gpt turn, roles out of order, an empty answer, image marks that do not go with the images.
    """
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise Error(f"{_name(record)}: conversations: missing, or not a list with turns in it", "no record")
    messages = [_message(record, number, turn) for number, turn in enumerate(turns)]
    skipped = int(messages[0]["role"] != "user")
    messages = messages[skipped:]
    if not any(message["role"] == "assistant" for message in messages):
        raise Error(f"{_name(record)}: conversations: no gpt turn answers a human one", "no answer")
    for number, message in enumerate(messages):
        _check_turn(f"{_name(record)}: conversations[{number + skipped}]", number, message, "from", "value")
    if messages[-1]["role"] == "user":
        messages = messages[:-1]
    _check_marks(record, messages)
    return messages


def _message(record: dict, number: int, turn: object) -> Message:
    """One turn of an official record as a message."""
    place = f"{_name(record)}: conversations[{number}]"
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise Error(f"{place}.value: missing, or not text", "no record")
    role = {"human": "user", "gpt": "assistant"}.get(str(turn.get("from")))
    if role is None and number:
        raise Error(f"{place}.from: {turn.get('from')!r} where 'human' or 'gpt' is due", "no record")
    return {"role": role or "", "content": turn["value"]}


def _check_marks(record: dict, messages: list[Message]) -> None:
    """Raise Error when image marks lack their images, or one of several images lacks its mark."""
    marks = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    images = len(images_from_record(record))
    if marks and not images:
        problem = f"{marks} {IMAGE_TOKEN} marks, but the record has no image"
        raise Error(f"{_name(record)}: conversations: {problem}", "marks")
    if images > 1 and marks != images:
        raise Error(f"{_name(record)}: conversations: {marks} {IMAGE_TOKEN} marks for {images} images", "marks")


def _name(record: object) -> str:
    """What to call a record in an error."""
    if not isinstance(record, dict):
        return f"a record that is not an object but {type(record).__name__}"
    return f"record {record.get('id', 'without id')}"
