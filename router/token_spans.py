"""Where the tokens of a prompt lie in its text, for the routes that tell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tessera.router.prompt import ImagePart, Part, TextPart
from tessera.router.request import PlacedImage
from tessera.router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token and the characters of the prompt's text it stands for; 0 to 0 means none."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a prompt's text: words, or what stands there for one picture."""

    words: str | None = field(repr=False)  # None: a picture
    start: int
    stop: int


def native_stretches(text: str, parsed: Sequence[Part]) -> list[Stretch]:
    """The parts of a native prompt, in which pictures are written out."""
    stretches: list[Stretch] = []
    start = 0
    for part in parsed:
        if isinstance(part, TextPart):
            stop = start + len(part.text)
            stretches.append(Stretch(part.text, start, stop))
        else:
            stop = text.index(part.source, start) + len(part.source)
            stop += len("</image>") if text.startswith("</image>", stop) else len(")")
            stretches.append(Stretch(None, start, stop))
        start = stop
    return stretches


def chat_stretches(parts: Sequence[str | ImagePart], image_token: str) -> list[Stretch]:
    """The parts of a rendered chat, in which `image_token` stands for each picture."""
    stretches: list[Stretch] = []
    start = 0
    for part in parts:
        words = part if isinstance(part, str) else None
        stop = start + len(image_token if words is None else words)
        stretches.append(Stretch(words, start, stop))
        start = stop
    return stretches


def token_spans(
    tokenizer: Tokenizer,
    stretches: Sequence[Stretch],
    add_special_tokens: bool,
    ids: Sequence[int],
    images: Sequence[PlacedImage],
) -> list[TokenSpan]:
    """Where each token of a prompt lies in its text.

    Parts are tokenised one by one to find out; should that give other ids than the prompt as a
    whole, the tokens are listed without places.

    Args:
        add_special_tokens: as for the prompt as a whole.
        ids: of the prompt as a whole.
        images: its pictures, one for each stretch without words.
    """
    spans: list[TokenSpan] = []
    placed = iter(images)
    for stretch in stretches:
        if stretch.words is None:
            image = next(placed)
            name = tokenizer.token_text(ids[image.offset])
            span = TokenSpan(ids[image.offset], name, stretch.start, stretch.stop)
            spans += [span] * image.image.num_tokens
        else:
            special = add_special_tokens and not spans
            spans += _text_spans(tokenizer, stretch.words, stretch.start, special)
    if [span.id for span in spans] == list(ids):
        return spans
    return [TokenSpan(id_, tokenizer.token_text(id_), 0, 0) for id_ in ids]


def _text_spans(
    tokenizer: Tokenizer, text: str, start: int, add_special_tokens: bool
) -> Iterator[TokenSpan]:
    for id_, begin, end in tokenizer.encode_with_spans(text, add_special_tokens):
        if begin == end:  # an added token, like the one sequences begin with
            yield TokenSpan(id_, tokenizer.token_text(id_), 0, 0)
        else:
            yield TokenSpan(id_, text[begin:end], start + begin, start + end)
