"""From a conversation to the prompt a model was trained on, through the model's own template."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.router.chat_messages import (
    ChatMessage,
    append_text,
    place_pictures,
    read_messages,
)
from tessera.router.errors import TemplateError
from tessera.router.model_files import ModelFiles, ModelFilesError, read_json, token_text
from tessera.router.prompt import IMAGE_TOKEN
from tessera.router.template_sandbox import Template
from tessera.router.tool_messages import ToolConversation

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_KNOWS_DEVELOPER = re.compile("""["']developer["']""")
_PROBE = "d41f0c7e"  # a text no template prints by itself


class ChatTemplate:
    """A model's chat template. Thread-safe.

    Some templates loop over a message's parts, others print its content as a string; handed the
    wrong one, they drop the text or print Python. Which one a template wants is found out by
    trying both.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        image_token: str = IMAGE_TOKEN,
        takes_pictures: bool = True,
    ) -> None:
        """Compile a template.

        Args:
            source: Jinja as transformers understands it.
            special_tokens: texts of bos_token and its like, which the template may print.
            image_token: what the template prints for a picture.
            takes_pictures: whether the model does.

        Raises:
            TemplateError: a syntax error.
        """
        # What the template prints for pictures becomes a name no user can write.
        self._placeholder = f"<image-{secrets.token_hex(16)}>"
        self._template = Template(source.replace(image_token, self._placeholder))
        shows_tools = "tools" in self._template.variables
        self.tool_source = source if shows_tools else None  # tells how the model writes calls
        self._special_tokens = dict(special_tokens or {})
        self._image_token = image_token
        self._takes_pictures = takes_pictures
        # Newer names of roles, for templates that only know the older ones, and the reverse.
        self._roles = {"function": "tool"}
        if not _KNOWS_DEVELOPER.search(source):
            self._roles["developer"] = "system"
        self.wants_lists = self._prefers_lists()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        tokenizer_config_path: Path | None = None,
        override: str | None = None,
    ) -> "ChatTemplate | None":
        """The chat template of a model, or None if it has none.

        The first of: `override`, a template or the path of a file with one, as plain Jinja or under
        the key `chat_template` of a .json; the file at `tokenizer_config_path`; the folder's
        chat_template.jinja, chat_template.json, tokenizer_config.json, processor_config.json.

        Raises:
            ModelFilesError: a file or the template in it is damaged.
        """
        files = ModelFiles.read(folder)
        config_path = tokenizer_config_path or folder / "tokenizer_config.json"
        config = read_json(config_path, None if tokenizer_config_path else {})
        explicit = _named_template(config, config_path) if tokenizer_config_path else None
        given = _given_template(override) if override else None
        source = given or explicit or _find(folder, config)
        if source is None:
            return None
        tokens = read_json(folder / "special_tokens_map.json", {}) | config
        special = {key: text for key in _SPECIAL_TOKENS if (text := token_text(tokens.get(key)))}
        try:
            return cls(
                source,
                special,
                image_token=files.image_token or IMAGE_TOKEN,
                takes_pictures=files.layout is not None,
            )
        except TemplateError as error:
            raise ModelFilesError(f"{'CHAT_TEMPLATE' if given else folder}: {error}.") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: ToolConversation | None = None,
    ) -> list[str | int]:
        """The prompt of a conversation.

        Args:
            messages: as OpenAI's API has them; a picture is a part of type "image_url" or "image".
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: end inside the final message instead, for the model to go on.
            tools: what may be called, and how the template takes that and earlier calls.

        Returns:
            Texts in order, and in between the index of each picture, counted over all messages. No
            text ever stands for a picture, even if a user wrote the image token.

        Raises:
            TemplateError: messages the template refuses, or a picture it does not place.
        """
        conversation = [
            replace(message, role=self._roles.get(message.role, message.role))
            for message in read_messages(messages)
        ]
        num_pictures = sum(message.num_pictures for message in conversation)
        conversation = place_pictures(conversation, self._placeholder)
        if tools is not None:
            conversation = tools.written(conversation)
        tag = f"<continue-{secrets.token_hex(8)}> "
        if continue_final_message:
            conversation[-1] = append_text(conversation[-1], tag)
        text = self._print(
            conversation,
            self.wants_lists,
            add_generation_prompt and not continue_final_message,
            tools.template_tools if tools else None,
        )
        if continue_final_message:
            text = _up_to(text, tag)
        return self._split(text, num_pictures)

    def text(self, parts: Sequence[str | int]) -> str:
        """What `render` returned, as one text for people to read."""
        return "".join(part if isinstance(part, str) else self._image_token for part in parts)

    def wants_special_tokens(self, parts: Sequence[str | int]) -> bool:
        """Whether the tokenizer has to add its special tokens to a rendered prompt.

        As transformers decides: templates of vision models leave begin-of-sequence to the
        tokenizer unless they print it; a text model's template prints all it wants.
        """
        bos = self._special_tokens.get("bos_token")
        printed = bool(parts and bos and str(parts[0]).startswith(bos))
        return self._takes_pictures and not printed

    def _print(
        self,
        conversation: Sequence[ChatMessage],
        as_lists: bool,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        messages = [
            m.as_list() if as_lists else m.as_string(self._placeholder) for m in conversation
        ]
        return self._template.render(
            **self._special_tokens,
            image_token=self._placeholder,
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def _split(self, text: str, num_pictures: int) -> list[str | int]:
        texts = text.split(self._placeholder)
        if len(texts) - 1 != num_pictures:
            raise TemplateError(
                f"the messages hold {num_pictures} pictures, but the model's chat template places "
                f"{len(texts) - 1}; put pictures into user messages only"
            )
        parts: list[str | int] = []
        for index, piece in enumerate(texts):
            if index:
                parts.append(index - 1)
            if piece:
                parts.append(piece)
        return parts

    def _prefers_lists(self) -> bool:
        picture = {"type": "image"}
        as_text = [{"type": "text", "text": _PROBE}]
        if not self._prints_probe(as_text, True):
            return False
        shown = self._try([picture, *as_text], True)
        return shown.count(self._placeholder) == 1 or not self._prints_probe(_PROBE, False)

    def _prints_probe(self, content: object, as_lists: bool) -> bool:
        shown = self._try(content, as_lists)
        is_python = any(quote + _PROBE in shown for quote in "'\"")  # a printed list or dict
        return _PROBE in shown and not is_python

    def _try(self, content: object, as_lists: bool) -> str:
        try:
            return self._print(
                read_messages([{"role": "user", "content": content}]), as_lists, True
            )
        except TemplateError:
            return ""


def _up_to(text: str, tag: str) -> str:
    """`text` before `tag`; a template that trims the message takes the tag's space away."""
    place = text.rfind(tag.strip())
    if place < 0:
        raise TemplateError("the chat template does not print the final message in full")
    is_trimmed = not text.startswith(tag, place)
    return text[:place].rstrip() if is_trimmed else text[:place]


def _given_template(given: str) -> str:
    """The template an operator gave, literally or as a file."""
    if "{{" in given or "{%" in given:
        return given
    path = Path(given)
    if path.suffix != ".json":
        return _read_text(path)
    source = _named_template(read_json(path), path)
    if source is None:
        raise ModelFilesError(f"{path} has no chat_template.")
    return source


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise ModelFilesError(f"{path} cannot be read as UTF-8 text.") from None


def _find(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return _read_text(jinja)
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        config = tokenizer_config if name == "tokenizer_config.json" else read_json(path, {})
        source = _named_template(config, path)
        if source is not None:
            return source
    return None


def _named_template(config: Mapping[str, Any], path: Path) -> str | None:
    """`chat_template`: a string, or a list of named ones of which "default" counts."""
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value if _is_named(entry)}
    if isinstance(value, Mapping):
        value = value.get("default")
    if value is None or isinstance(value, str):
        return value
    raise ModelFilesError(f"{path}: chat_template is neither a string nor a list of templates.")


def _is_named(entry: object) -> bool:
    return isinstance(entry, Mapping) and {"name", "template"} <= entry.keys()
