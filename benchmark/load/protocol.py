"""How the servers' APIs are asked, and what their events mean."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmark.load.workload import Turn


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn that has been answered."""

    turn: Turn
    answer: str


@dataclass(frozen=True, slots=True)
class Heard:
    """What one event says. `num_tokens`: of the whole answer so far, where the event tells it."""

    text: str = ""
    num_tokens: int | None = None
    error: str = ""  # its kind


class Api(Protocol):
    """One kind of streaming route."""

    @property
    def path(self) -> str:
        """Where it is."""
        ...

    def body(
        self, system: str, past: Sequence[Exchange], turn: Turn, max_tokens: int
    ) -> dict[str, Any]:
        """The request that asks for the next answer."""
        ...

    def read(self, event: dict[str, Any]) -> Heard:
        """Understand an event."""
        ...


@dataclass(frozen=True, slots=True)
class ChatApi:
    """OpenAI's chats."""

    model: str
    path: str = "/v1/chat/completions"

    def body(
        self, system: str, past: Sequence[Exchange], turn: Turn, max_tokens: int
    ) -> dict[str, Any]:
        """See `Api`."""
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": system})
        for exchange in past:
            messages.append({"role": "user", "content": _content(exchange.turn)})
            messages.append({"role": "assistant", "content": exchange.answer})
        messages.append({"role": "user", "content": _content(turn)})
        return {"messages": messages} | _openai_options(self.model, max_tokens)

    def read(self, event: dict[str, Any]) -> Heard:
        """See `Api`."""
        return _read_openai(event, lambda choice: choice.get("delta", {}).get("content") or "")


@dataclass(frozen=True, slots=True)
class CompletionApi:
    """OpenAI's older completions; text only."""

    model: str
    path: str = "/v1/completions"

    def body(
        self, system: str, past: Sequence[Exchange], turn: Turn, max_tokens: int
    ) -> dict[str, Any]:
        """See `Api`."""
        prompt = {"prompt": _plain_prompt(system, past, turn)}
        return prompt | _openai_options(self.model, max_tokens)

    def read(self, event: dict[str, Any]) -> Heard:
        """See `Api`."""
        return _read_openai(event, lambda choice: choice.get("text") or "")


@dataclass(frozen=True, slots=True)
class GenerateApi:
    """text-generation-inference's own streams."""

    path: str = "/generate_stream"

    def body(
        self, system: str, past: Sequence[Exchange], turn: Turn, max_tokens: int
    ) -> dict[str, Any]:
        """See `Api`."""
        prompt = _plain_prompt(system, past, turn)
        return {"inputs": prompt, "parameters": {"max_new_tokens": max_tokens}}

    def read(self, event: dict[str, Any]) -> Heard:
        """See `Api`."""
        if "error" in event:
            return Heard(error=str(event.get("error_type", "error")))
        token = event.get("token") or {}
        return Heard("" if token.get("special") else token.get("text", ""), event.get("index"))


APIS = ("chat", "completions", "generate")


def api_named(name: str, model: str) -> Api:
    """One of `APIS`."""
    if name == "chat":
        return ChatApi(model)
    return CompletionApi(model) if name == "completions" else GenerateApi()


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The payload of one line of an event stream; None for what is none, and for [DONE]."""
    if not line.startswith(b"data:"):
        return None
    payload = line[5:].strip()
    if payload == b"[DONE]":
        return None
    parsed = json.loads(payload)
    return parsed if isinstance(parsed, dict) else {"error": "not an object"}


def _openai_options(model: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read_openai(event: dict[str, Any], text_of: Any) -> Heard:
    if "error" in event:
        error = event["error"]
        kind = error.get("type") if isinstance(error, dict) else None
        return Heard(error=str(kind or event.get("error_type") or "error"))
    text = "".join(text_of(choice) for choice in event.get("choices", []))
    usage = event.get("usage") or {}
    return Heard(text, usage.get("completion_tokens"))


def _content(turn: Turn) -> str | list[dict[str, Any]]:
    if not turn.pictures:
        return turn.text
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in turn.pictures]
    return [*pictures, {"type": "text", "text": turn.text}]


def _plain_prompt(system: str, past: Sequence[Exchange], turn: Turn) -> str:
    """Turns as lines; pictures in text-generation-inference's way of writing them."""
    lines = [system] if system else []
    for exchange in past:
        lines += [_with_pictures(exchange.turn), exchange.answer]
    return "\n".join([*lines, _with_pictures(turn)])


def _with_pictures(turn: Turn) -> str:
    return "".join(f"![]({url})" for url in turn.pictures) + turn.text
