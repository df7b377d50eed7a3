"""From what a client wrote to token ids and prepared pictures, off the event loop.

Two pools of threads: one tokenises, one decodes and cuts pictures. Text therefore never waits for
somebody else's pictures.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from tessera.router.chat_messages import plain_messages
from tessera.router.chat_template import ChatTemplate
from tessera.router.errors import TemplateError, ValidationError
from tessera.router.metrics.pictures import PictureMetrics
from tessera.router.model_files import ModelFiles
from tessera.router.picture_allowance import PictureAllowance
from tessera.router.pictures import Pictures, reductions
from tessera.router.pieces import PieceKind
from tessera.router.prompt import ImagePart, Part, TextPart, count_pictures, parse_inputs
from tessera.router.request import PlacedImage, PreparedImage
from tessera.router.schemas import Message
from tessera.router.settings import RouterSettings
from tessera.router.token_spans import TokenSpan, chat_stretches, native_stretches, token_spans
from tessera.router.tokenizer import Tokenizer
from tessera.router.tool_formats import find_format
from tessera.router.tool_messages import ToolConversation
from tessera.router.tools import ToolUse

T = TypeVar("T")

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
    add_generation_prompt: bool = True  # end with the beginning of an answer
    continue_final_message: bool = False  # end inside the final message instead
    tools: ToolUse | None = None


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


class PromptBuilder:
    """Builds prompts for one model."""

    def __init__(
        self,
        settings: RouterSettings,
        tokenizer: Tokenizer,
        files: ModelFiles,
        template: ChatTemplate | None,
        metrics: PictureMetrics,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._files = files
        self._template = template
        shown = template.tool_source if template else None
        self.tool_format = find_format(shown, tokenizer.special_id)
        self._longest_piece = _longest_piece(tokenizer)
        self._text_pool = ThreadPoolExecutor(settings.validation_workers, "tokenise")
        self._pictures = Pictures(files.layout, settings, metrics) if files.layout else None

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._text_pool.shutdown(wait=False, cancel_futures=True)
        if self._pictures:
            self._pictures.close()

    async def build(
        self,
        source: PromptSource,
        max_tokens: int,
        truncate: int | None,
        allowance: PictureAllowance,
    ) -> BuiltPrompt:
        """Tokenise a prompt and prepare its pictures.

        Args:
            max_tokens: what the prompt should fit in. A text that is certainly longer is refused
                without tokenising it, and pictures are reduced (IMAGE_OVERFLOW=fit); the exact
                count is the caller's to check.
            truncate: keep so many tokens, the last ones; None: all.
            allowance: what the pictures of the request may still cost.

        Raises:
            ValidationError: it cannot be read, or is certainly too long.
            TemplateError: the model has no chat template, or it refuses the conversation.
        """
        match source:
            case TextPrompt(text):
                parsed = await self._in(self._text_pool, lambda: self._parse(text))
                parts = [p.text if isinstance(p, TextPart) else p for p in parsed]
                return await self._encode(parts, text, True, max_tokens, truncate, allowance)
            case ChatPrompt():
                parts, add_special_tokens = await self._render(source)
                text = "".join(part for part in parts if isinstance(part, str))
                return await self._encode(
                    parts, text, add_special_tokens, max_tokens, truncate, allowance
                )
            case IdsPrompt(ids):
                return await self._checked_ids(ids, max_tokens)

    async def tokenize(
        self, source: TextPrompt | ChatPrompt, max_tokens: int, allowance: PictureAllowance
    ) -> tuple[str, list[TokenSpan]]:
        """A prompt's text and its tokens, pictures included. Raises as `build` does.

        Returns:
            The text as the client wrote it or as the template rendered it, in which the image token
            stands for each picture; and where each token lies in it.
        """
        tokenizer = self._tokenizer
        parts: Sequence[str | ImagePart]
        if isinstance(source, TextPrompt):
            text, add_special_tokens = source.text, True
            parsed = await self._in(self._text_pool, lambda: self._parse(text))
            parts = [p.text if isinstance(p, TextPart) else p for p in parsed]
            stretches = native_stretches(text, parsed)
        else:
            parts, add_special_tokens = await self._render(source)
            image_token = tokenizer.image_token or ""
            text = "".join(part if isinstance(part, str) else image_token for part in parts)
            stretches = chat_stretches(parts, image_token)
        built = await self._encode(parts, text, add_special_tokens, max_tokens, None, allowance)
        return text, await self._in(
            self._text_pool,
            lambda: token_spans(tokenizer, stretches, add_special_tokens, built.ids, built.images),
        )

    async def _encode(
        self,
        parts: Sequence[str | ImagePart],
        text: str,
        add_special_tokens: bool,
        max_tokens: int,
        truncate: int | None,
        allowance: PictureAllowance,
    ) -> BuiltPrompt:
        if truncate is not None:
            parts = _tail(parts, (truncate + TRUNCATION_SLACK_TOKENS) * self._longest_piece)
        self._check_size(parts, max_tokens)
        tokenizer = self._tokenizer
        short = await self._in(
            self._text_pool, lambda: tokenizer.encode_parts(parts, add_special_tokens)
        )
        pictures, warnings = await self._prepare(parts, short, max_tokens, truncate, allowance)

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
        allowance: PictureAllowance,
    ) -> tuple[list[PreparedImage], tuple[str, ...]]:
        """The pictures among `parts`, and sentences about those that were reduced.

        Args:
            ids: the prompt with one token per picture.
        """
        pictures = [part for part in parts if isinstance(part, ImagePart)]
        if not pictures:
            return [], ()
        sources = [picture.source for picture in pictures]
        overviews = {index for index, picture in enumerate(pictures) if picture.overview_only}
        assert self._pictures is not None and self._files.layout is not None  # by `_check_size`
        room = None
        if self._settings.image_overflow == "fit":
            room = self._room(ids, len(sources), max_tokens, truncate)
        images = await self._pictures.prepare(sources, room, allowance, overviews)
        limit, name = (truncate, "truncate") if truncate else (max_tokens, "MAX_INPUT_TOKENS")
        return images, reductions(self._files.layout, images, limit, name, overviews)

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

    async def _render(self, chat: ChatPrompt) -> tuple[list[str | ImagePart], bool]:
        """The conversation as the model was trained on it, and whether the tokenizer adds to it."""
        template = self._template
        if template is None:
            raise TemplateError(
                "this model has no chat template; send a finished prompt to /v1/completions, or "
                "start the server with CHAT_TEMPLATE"
            )
        messages, pictures = plain_messages(chat.messages)
        tools = ToolConversation(self.tool_format, chat.tools)

        def render() -> list[str | int]:
            return template.render(
                messages, chat.add_generation_prompt, chat.continue_final_message, tools
            )

        rendered = await self._in(self._text_pool, render)
        parts = [pictures[part] if isinstance(part, int) else part for part in rendered]
        return parts, template.wants_special_tokens(rendered)


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Characters the longest token stands for: so many characters make at least one token."""
    if tokenizer.kind is PieceKind.OTHER:
        return LONGEST_PIECE_OF_OTHERS
    return max(
        (len(tokenizer.piece(token_id)) for token_id in range(tokenizer.vocab_size)), default=1
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
