"""From what a client wrote to token ids and prepared pictures, off the event loop.

Two pools of threads: one tokenises, one decodes and cuts pictures. Text therefore never waits for
somebody else's pictures.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tessera.router.chat_template import ChatTemplate
from tessera.router.errors import TemplateError, ValidationError
from tessera.router.model_files import ModelFiles
from tessera.router.pictures import Pictures, reductions
from tessera.router.pieces import PieceKind
from tessera.router.prompt import ImagePart, Part, TextPart, count_pictures, parse_inputs
from tessera.router.request import PlacedImage, PreparedImage
from tessera.router.schemas import Message
from tessera.router.settings import RouterSettings
from tessera.router.tokenizer import Tokenizer

T = TypeVar("T")

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
IMAGE_PARTS = frozenset({"image_url", "image", "input_image"})

# Where a token's text depends on its neighbours, nothing bounds it; no known token comes near.
LONGEST_PIECE_OF_OTHERS = 1000
TRUNCATION_SLACK_TOKENS = 16  # tokens at a cut come out differently; keep the cut off the result


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt of the native kind: text, with pictures written into it."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, to be rendered by the model's template."""

    messages: Sequence[Message] = field(repr=False)


@dataclass(frozen=True, slots=True)
class IdsPrompt:
    """A prompt the client tokenised itself."""

    ids: tuple[int, ...] = field(repr=False)


PromptSource = TextPrompt | ChatPrompt | IdsPrompt


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """A prompt as the shards take it."""

    ids: tuple[int, ...]
    images: tuple[PlacedImage, ...]
    text: str = field(repr=False)  # as the client wrote it, or as the template rendered it
    warnings: tuple[str, ...] = ()  # what the client should be told beside its answer


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token and the characters of the client's text it stands for; 0 to 0 means none."""

    id: int
    text: str
    start: int
    stop: int


class PromptBuilder:
    """Builds prompts for one model."""

    def __init__(
        self,
        settings: RouterSettings,
        tokenizer: Tokenizer,
        files: ModelFiles,
        template: ChatTemplate | None,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._files = files
        self._template = template
        self._longest_piece = _longest_piece(tokenizer)
        workers = settings.validation_workers
        self._text_pool = ThreadPoolExecutor(workers, "tokenise")
        layout, max_pixels = files.layout, settings.max_image_pixels
        self._pictures = Pictures(layout, max_pixels, workers) if layout else None

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._text_pool.shutdown(wait=False, cancel_futures=True)
        if self._pictures:
            self._pictures.close()

    async def build(
        self, source: PromptSource, max_tokens: int, truncate: int | None
    ) -> BuiltPrompt:
        """Tokenise a prompt and prepare its pictures.

        Args:
            max_tokens: what the prompt should fit in. A text that is certainly longer is refused
                without tokenising it, and pictures are reduced (IMAGE_OVERFLOW=fit); the exact
                count is the caller's to check.
            truncate: keep so many tokens, the last ones; None: all.

        Raises:
            ValidationError: it cannot be read, or is certainly too long.
            TemplateError: the model has no chat template, or it refuses the conversation.
        """
        match source:
            case TextPrompt(text):
                parsed = await self._in(self._text_pool, lambda: self._parse(text))
                parts = [p.text if isinstance(p, TextPart) else p for p in parsed]
                return await self._encode(parts, text, True, max_tokens, truncate)
            case ChatPrompt(messages):
                parts, add_special_tokens = await self._render(messages)
                text = "".join(part for part in parts if isinstance(part, str))
                return await self._encode(parts, text, add_special_tokens, max_tokens, truncate)
            case IdsPrompt(ids):
                return await self._checked_ids(ids, max_tokens)

    async def tokenize(self, text: str, max_tokens: int) -> list[TokenSpan]:
        """The tokens of a native prompt, pictures included. Raises as `build` does."""
        parsed = await self._in(self._text_pool, lambda: self._parse(text))
        parts = [p.text if isinstance(p, TextPart) else p for p in parsed]
        built = await self._encode(parts, text, True, max_tokens, None)
        return await self._in(self._text_pool, lambda: self._spans(text, parsed, built))

    async def _encode(
        self,
        parts: Sequence[str | ImagePart],
        text: str,
        add_special_tokens: bool,
        max_tokens: int,
        truncate: int | None,
    ) -> BuiltPrompt:
        if truncate is not None:
            parts = _tail(parts, (truncate + TRUNCATION_SLACK_TOKENS) * self._longest_piece)
        self._check_size(parts, max_tokens)
        tokenizer = self._tokenizer
        short = await self._in(
            self._text_pool, lambda: tokenizer.encode_parts(parts, add_special_tokens)
        )
        pictures, warnings = await self._prepare(parts, short, max_tokens, truncate)

        def place() -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
            ids, images = tokenizer.place_images(short, pictures)
            if truncate is None:
                return ids, images
            return tokenizer.truncate_left(ids, images, truncate)

        ids, images = await self._in(self._text_pool, place)
        if not ids:
            raise ValidationError("the prompt has no tokens")
        return BuiltPrompt(ids, images, text, warnings)

    def _parse(self, text: str) -> list[Part]:
        """Take a native prompt apart, unless that would make millions of parts."""
        self._check_num_images(count_pictures(text))
        return parse_inputs(text)

    def _check_size(self, parts: Sequence[str | ImagePart], max_tokens: int) -> None:
        """What can be refused by counting, before work that grows with it."""
        self._check_num_images(sum(isinstance(part, ImagePart) for part in parts))
        num_characters = sum(len(part) for part in parts if isinstance(part, str))
        if num_characters > max_tokens * self._longest_piece:
            raise ValidationError(
                f"`inputs` must have less than {max_tokens} tokens. Given: at least "
                f"{num_characters // self._longest_piece} ({num_characters} characters of text). "
                "Shorten the text, or raise MAX_INPUT_TOKENS."
            )

    def _check_num_images(self, num_images: int) -> None:
        if num_images and self._files.layout is None:
            raise ValidationError("this model takes text only; the request holds pictures")
        if num_images > self._settings.max_images:
            raise ValidationError(
                f"the request holds {num_images} pictures, over the limit of "
                f"{self._settings.max_images} (MAX_IMAGES)"
            )

    async def _prepare(
        self,
        parts: Sequence[str | ImagePart],
        ids: Sequence[int],
        max_tokens: int,
        truncate: int | None,
    ) -> tuple[list[PreparedImage], tuple[str, ...]]:
        """The pictures among `parts`, and sentences about those that were reduced.

        Args:
            ids: the prompt with one token per picture.
        """
        sources = [part.source for part in parts if isinstance(part, ImagePart)]
        if not sources:
            return [], ()
        assert self._pictures is not None and self._files.layout is not None  # by `_check_size`
        room = None
        if self._settings.image_overflow == "fit":
            room = self._room(ids, len(sources), max_tokens, truncate)
        images = await self._pictures.prepare(sources, room)
        limit, name = (truncate, "truncate") if truncate else (max_tokens, "MAX_INPUT_TOKENS")
        return images, reductions(self._files.layout, images, limit, name)

    def _room(
        self, ids: Sequence[int], num_images: int, max_tokens: int, truncate: int | None
    ) -> int | None:
        """Tokens the pictures may become together; None: any number.

        `truncate` can cut off text before the first picture, so only what follows counts then; if
        that cannot fit, pictures keep their size and the first ones fall out.
        """
        if truncate is None:
            return max_tokens - (len(ids) - num_images)
        places = (i for i, id_ in enumerate(ids) if id_ == self._files.image_token_id)
        first = next(places, 0)
        keeps_head = first > 0 and ids[0] == self._tokenizer.bos_id
        room = truncate - keeps_head - (len(ids) - first - num_images)
        assert self._files.layout is not None
        return room if room >= num_images * self._files.layout.min_tokens else None

    async def _checked_ids(self, ids: tuple[int, ...], max_tokens: int) -> BuiltPrompt:
        """Ids from a client: in the vocabulary, and none that would ask for a picture."""
        if max(ids) >= self._files.vocab_size:
            raise ValidationError(
                f"`prompt` must hold token ids below {self._files.vocab_size}", "prompt"
            )
        if self._files.image_token_id in ids:
            raise ValidationError(
                f"`prompt` must not hold token {self._files.image_token_id}, which stands for a "
                "picture; send pictures to /v1/chat/completions",
                "prompt",
            )
        if len(ids) > max_tokens:
            return BuiltPrompt(ids, (), "")  # to be refused; its text is not worth finding out
        text = await self._in(self._text_pool, lambda: self._tokenizer.decode(ids))
        return BuiltPrompt(ids, (), text)

    def _in(self, pool: ThreadPoolExecutor, job: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(pool, job)

    async def _render(self, messages: Sequence[Message]) -> tuple[list[str | ImagePart], bool]:
        """The conversation as the model was trained on it, and whether the tokenizer adds to that.

        A final message of the assistant's is continued, not answered.
        """
        template = self._template
        if template is None:
            raise TemplateError(
                "this model has no chat template; send a finished prompt to /v1/completions, or "
                "start the server with TOKENIZER_CONFIG_PATH"
            )
        plain, sources = _plain_messages(messages)
        to_continue = messages[-1].role == "assistant"

        def render() -> list[str | int]:
            return template.render(plain, continue_final_message=to_continue)

        rendered = await self._in(self._text_pool, render)
        parts = [ImagePart(sources[part]) if isinstance(part, int) else part for part in rendered]
        return parts, template.wants_special_tokens(rendered)

    def _spans(
        self, text: str, parsed: Sequence[TextPart | ImagePart], built: BuiltPrompt
    ) -> list[TokenSpan]:
        """Where each token lies in the client's text.

        Parts are tokenised one by one to find out; should that give other ids than the prompt as a
        whole, the tokens are listed without places.
        """
        spans: list[TokenSpan] = []
        images = iter(built.images)
        for part, start, stop in _places(text, parsed):
            if isinstance(part, ImagePart):
                image = next(images)
                token_id = built.ids[image.offset]
                name = self._tokenizer.token_text(token_id)
                spans += [TokenSpan(token_id, name, start, stop)] * image.image.num_tokens
            else:
                spans += self._text_spans(part.text, start, first=not spans)
        if tuple(span.id for span in spans) == built.ids:
            return spans
        return [TokenSpan(i, self._tokenizer.token_text(i), 0, 0) for i in built.ids]

    def _text_spans(self, text: str, start: int, *, first: bool) -> Iterator[TokenSpan]:
        for token_id, begin, end in self._tokenizer.encode_with_spans(text, first):
            if begin == end:  # an added token, like the one sequences begin with
                yield TokenSpan(token_id, self._tokenizer.token_text(token_id), 0, 0)
            else:
                yield TokenSpan(token_id, text[begin:end], start + begin, start + end)


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Characters the longest token stands for: so many characters make at least one token."""
    if tokenizer.kind is PieceKind.OTHER:
        return LONGEST_PIECE_OF_OTHERS
    return max(
        (len(tokenizer.piece(token_id)) for token_id in range(tokenizer.vocab_size)), default=1
    )


def _plain_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as templates take them, and the pictures they hold, taken out, in order."""
    plain: list[dict[str, Any]] = []
    sources: list[str] = []
    for index, message in enumerate(messages):
        content: str | list[dict[str, Any]]
        if isinstance(message.content, list):
            content = []
            for part in message.content:
                if part.text is not None and part.type in TEXT_PARTS:
                    content.append({"type": "text", "text": part.text})
                elif part.image_source is not None and part.type in IMAGE_PARTS:
                    content.append({"type": "image"})
                    sources.append(part.image_source)
                else:
                    raise _unreadable_part(index)
        elif message.content is None:
            raise ValidationError(f"`messages[{index}].content` is required.", "messages")
        else:
            content = message.content
        plain.append({"role": message.role, "content": content})
    return plain, sources


def _unreadable_part(index: int) -> ValidationError:
    return ValidationError(
        f"`messages[{index}].content` may hold parts of type `text` with a `text`, and of type "
        "`image_url` with a picture as a data URI; nothing else.",
        "messages",
    )


def _tail(parts: Sequence[str | ImagePart], max_characters: int) -> list[str | ImagePart]:
    """The last parts, up to the text that exceeds `max_characters`, of which the end is kept."""
    kept: list[str | ImagePart] = []
    room = max_characters
    for part in reversed(parts):
        if isinstance(part, str):
            kept.append(part[-room:] if len(part) > room else part)
            room -= len(part)
            if room <= 0:
                break
        else:
            kept.append(part)
    return kept[::-1]


def _places(
    text: str, parsed: Sequence[TextPart | ImagePart]
) -> Iterator[tuple[TextPart | ImagePart, int, int]]:
    """Each part with where it begins and ends in the text it was parsed from."""
    start = 0
    for part in parsed:
        if isinstance(part, TextPart):
            stop = start + len(part.text)
        else:
            stop = text.index(part.source, start) + len(part.source)
            stop += len("</image>") if text.startswith("</image>", stop) else len(")")
        yield part, start, stop
        start = stop
