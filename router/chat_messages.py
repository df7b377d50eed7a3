"""A conversation in one form, whatever form it came in, and in the form a template expects.

Whether the text of a user places its pictures is decided here. The placeholder that stands for a
picture is a name nobody can guess, so a literal `<image>` that places nothing is plain text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tessera.router.errors import TemplateError, ValidationError
from tessera.router.prompt import IMAGE_TOKEN, ImagePart
from tessera.router.schemas import ContentPart, Message

_PICTURES = frozenset({"image", "image_url", "input_image"})
_TEXTS = frozenset({"text", "input_text", "output_text"})
_FIELDS = {"role", "name", "tool_calls", "tool_call_id"}  # beside the content


@dataclass(frozen=True, slots=True)
class Picture:
    """Stands in a message where a picture is."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn."""

    role: str
    parts: tuple[str | Picture, ...]
    other: Mapping[str, Any]  # name, tool_calls, ...: handed to the template as they are

    @property
    def num_pictures(self) -> int:
        """Pictures in this turn."""
        return sum(isinstance(part, Picture) for part in self.parts)

    @property
    def num_literals(self) -> int:
        """Times its author wrote `<image>`; only users place pictures."""
        if self.role != "user":
            return 0
        return sum(part.count(IMAGE_TOKEN) for part in self.parts if isinstance(part, str))

    def as_list(self) -> dict[str, Any]:
        """For templates that loop over the parts.

        Templates often print only the first part of a turn that is not the user's, so its texts
        are joined.
        """
        parts = self.parts if self.role == "user" else join_texts(self.parts)
        content = [
            {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
            for part in parts
        ]
        return {**self.other, "role": self.role, "content": content}

    def as_string(self, placeholder: str) -> dict[str, Any]:
        """For templates that print the content; a picture before text gets a line of its own."""
        if not self.parts and "tool_calls" in self.other:
            return {**self.other, "role": self.role, "content": None}
        texts: list[str] = []
        for part in self.parts:
            if texts and texts[-1] == placeholder and isinstance(part, str):
                texts.append("" if part.startswith("\n") else "\n")
            texts.append(part if isinstance(part, str) else placeholder)
        return {**self.other, "role": self.role, "content": "".join(texts)}


def plain_messages(
    messages: Sequence[Message],
) -> tuple[list[dict[str, Any]], list[ImagePart]]:
    """A request's messages as templates know them, and its pictures, taken out of them, in order.

    Raises:
        ValidationError: a message without content, or with a part that is neither text nor picture.
    """
    plain: list[dict[str, Any]] = []
    pictures: list[ImagePart] = []
    for index, message in enumerate(messages):
        entry = message.model_dump(include=_FIELDS, exclude_none=True)
        if isinstance(message.content, list):
            parts = [_plain_part(part, index) for part in message.content]
            pictures += [part for part in parts if isinstance(part, ImagePart)]
            entry["content"] = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part}
                for part in parts
            ]
        elif message.content is None and not message.tool_calls:
            raise ValidationError(f"`messages[{index}].content` is required.", "messages")
        else:
            entry["content"] = message.content
        plain.append(entry)
    return plain, pictures


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """The messages of an OpenAI-style request.

    Args:
        messages: each with "role" and "content": a string, None, or a list of parts of type "text"
            or "image_url" (or their spellings elsewhere, "image", "input_text", ...).

    Raises:
        TemplateError: a message in no such form.
    """
    if not messages:
        raise TemplateError("`messages` cannot be empty")
    return [_read(message) for message in messages]


def place_pictures(messages: Sequence[ChatMessage], placeholder: str) -> list[ChatMessage]:
    """Put `placeholder` where users wrote `<image>`, if they wrote it once per picture.

    That is decided for the conversation as a whole; failing that, turn by turn. The pictures of
    such turns no longer are parts of their own, so that the template does not place them again.
    """
    whole = sum(m.num_literals for m in messages) == sum(m.num_pictures for m in messages)
    return [
        _placed(message, placeholder)
        if whole or message.num_literals == message.num_pictures
        else message
        for message in messages
    ]


def append_text(message: ChatMessage, text: str) -> ChatMessage:
    """The message with `text` behind its last text.

    Raises:
        TemplateError: it has none.
    """
    parts = list(message.parts)
    for index in reversed(range(len(parts))):
        part = parts[index]
        if isinstance(part, str):
            parts[index] = part + text
            return replace(message, parts=tuple(parts))
    raise TemplateError("the final message has no text that could be continued")


def _plain_part(part: ContentPart, index: int) -> str | ImagePart:
    if part.type in _TEXTS and part.text is not None:
        return part.text
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type in _PICTURES and part.image_source is not None:
        return ImagePart(part.image_source, overview_only=part.image_detail == "low")
    raise ValidationError(
        f"`messages[{index}].content` may hold parts of type `text` with a `text`, and of type "
        "`image_url` with a picture as a data URI or URL; nothing else.",
        "messages",
    )


def _read(message: Mapping[str, Any]) -> ChatMessage:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise TemplateError("every message needs a `role`")
    other = {key: _plain(value) for key, value in message.items() if key not in ("role", "content")}
    if content is None:
        return ChatMessage(role, (), other)
    if isinstance(content, str):
        return ChatMessage(role, (content,), other)
    if not isinstance(content, Sequence):
        raise TemplateError("a message's `content` must be a string or a list of parts")
    return ChatMessage(role, tuple(_read_part(part) for part in content), other)


def _read_part(part: Any) -> str | Picture:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _PICTURES:
        return Picture()
    text = part.get("text") if kind in _TEXTS else None
    if not isinstance(text, str):
        raise TemplateError(
            'each part of a message must be {"type": "text", "text": ...} or '
            '{"type": "image_url", "image_url": ...}'
        )
    return text


def _plain(value: Any) -> Any:
    """A copy of JSON's types only: any other object has methods a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TemplateError("a message holds something that is not JSON")


def _placed(message: ChatMessage, placeholder: str) -> ChatMessage:
    texts = tuple(part for part in message.parts if isinstance(part, str))
    if message.role == "user":
        texts = tuple(text.replace(IMAGE_TOKEN, placeholder) for text in texts)
    return replace(message, parts=texts)


def join_texts(parts: Sequence[str | Picture]) -> tuple[str | Picture, ...]:
    """Neighbouring texts as one."""
    joined: list[str | Picture] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
