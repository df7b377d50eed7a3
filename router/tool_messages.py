"""Tools, calls and their results as a model's chat template takes them.

A template that knows tools gets them as data. For any other they become text: the tools behind the
last thing the user said, calls in the words of the assistant, results in those of the user.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tessera.router.chat_messages import ChatMessage, Picture, join_texts
from tessera.router.tool_formats import ToolFormat
from tessera.router.tools import ToolUse, tools_json

PROMPT = """\
You can call these functions:
{tools}
To call one, answer in exactly this form, with the function's name and the values it needs:
{example}
Call several by writing several such blocks. You will be given what they return.\
"""
ONLY_IF_NEEDED = "If no function is needed, answer in plain words instead."
MUST_CALL = "Answer with a call now."


@dataclass(frozen=True, slots=True)
class ToolConversation:
    """Puts tools into a conversation."""

    format: ToolFormat
    use: ToolUse | None = None  # None: nothing may be called now, but earlier turns may have

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The template's variable `tools`."""
        if self.use is None or not self.format.is_native:
            return None
        return [tool.as_openai() for tool in self.use.tools]

    def written(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """The conversation as the template takes it; unchanged if no tools are in it."""
        if self.use is None and not any(map(_is_about_tools, messages)):
            return list(messages)
        if self.format.is_native:
            return self._prompted([_parsed(message) for message in messages])
        messages = self._prompted(list(messages))
        return _merged([self._as_text(message) for message in messages])

    def _prompted(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """With what is to be said about tools behind the user's last words."""
        prompt = self._prompt()
        if not prompt:
            return messages
        for index in reversed(range(len(messages))):
            if messages[index].role == "user":
                messages[index] = _joined(messages[index], (f"\n\n{prompt}",))
                return messages
        return [*messages, ChatMessage("user", (prompt,), {})]

    def _prompt(self) -> str:
        if self.use is None:
            return ""
        if self.format.is_native:
            return self.use.prompt or ""
        example = self._calls_text([("NAME", '{"PARAMETER": VALUE}')])
        prompt = PROMPT.format(tools=tools_json(self.use.tools), example=example)
        duty = MUST_CALL if self.use.required else ONLY_IF_NEEDED
        return "\n".join(filter(None, (prompt, self.use.prompt or duty)))

    def _as_text(self, message: ChatMessage) -> ChatMessage:
        if message.role == "tool":
            before, after = "<tool_response>\n", "\n</tool_response>"
            return ChatMessage("user", join_texts((before, *message.parts, after)), {})
        calls = message.other.get("tool_calls")
        if not calls:
            return message
        pairs = [(call["function"]["name"], _arguments_text(call)) for call in calls]
        space = "\n" if message.parts else ""
        written = _joined(message, (space + self._calls_text(pairs),))
        return replace(written, other={})

    def _calls_text(self, calls: Sequence[tuple[str, str]]) -> str:
        format = self.format
        written = [f"{format.head(name)}{arguments}}}" for name, arguments in calls]
        between = format.between or ""
        return format.marker + format.opening + between.join(written) + format.last


def _is_about_tools(message: ChatMessage) -> bool:
    return message.role == "tool" or bool(message.other.get("tool_calls"))


def _parsed(message: ChatMessage) -> ChatMessage:
    """With the arguments of its calls as objects, where they are JSON."""
    calls = message.other.get("tool_calls")
    if not calls:
        return message
    parsed = [
        {**call, "type": "function", "function": {**call["function"], "arguments": _object(call)}}
        for call in calls
    ]
    return replace(message, other={**message.other, "tool_calls": parsed})


def _object(call: Mapping[str, Any]) -> Any:
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):  # cut short, perhaps by a limit of tokens
        return arguments


def _arguments_text(call: Mapping[str, Any]) -> str:
    arguments = _object(call)
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Neighbouring turns of the user's as one: many templates want the roles to alternate."""
    merged: list[ChatMessage] = []
    for message in messages:
        if merged and message.role == merged[-1].role == "user":
            merged[-1] = _joined(merged[-1], ("\n", *message.parts))
        else:
            merged.append(message)
    return merged


def _joined(message: ChatMessage, parts: tuple[str | Picture, ...]) -> ChatMessage:
    return replace(message, parts=join_texts((*message.parts, *parts)))
