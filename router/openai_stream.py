"""Streams of the OpenAI routes: from the events of generations to chunks.

All chunks of a stream share everything but their choice, so that part is written once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from tessera.router.errors import RouterError
from tessera.router.event_stream import DONE, event, to_json
from tessera.router.notices import warnings_field
from tessera.router.openai_usage import usage
from tessera.router.replies import openai_error
from tessera.router.request import Completion, TokenEvent
from tessera.router.schemas import OpenAIBody
from tessera.router.ticket import Generation


class ChoiceWriter(Protocol):
    """Turns events into the choices of one kind of stream."""

    def choices(self, index: int, step: TokenEvent) -> list[str]:
        """What one event of choice `index` becomes, as JSON.

        Often one, sometimes none; never none for an event with a completion.
        """
        ...


class Chunks:
    """Writes chunks around choices."""

    def __init__(self, envelope: dict[str, Any], *, wants_usage: bool) -> None:
        """`envelope`: id, object and all else that the chunks have in common."""
        self._envelope = envelope
        self._head = f'data: {to_json(self._envelope)[:-1]},"choices":['
        self._tail = '],"usage":null' if wants_usage else "]"

    def one(self, choice: str, extra: dict[str, Any] | None = None) -> str:
        """The event of one choice, with more fields beside it."""
        more = "," + to_json(extra)[1:-1] if extra else ""
        return f"{self._head}{choice}{self._tail}{more}}}\n\n"

    def usage(self, counts: dict[str, Any], extra: dict[str, Any]) -> str:
        """The last event of a stream whose client asked for the usage."""
        return event(self._envelope | {"choices": [], "usage": counts} | extra)


class ChunkWriter:
    """Implements `token_streams.EventWriter`. Always ends with [DONE], as clients expect."""

    def __init__(
        self,
        generations: Sequence[Generation],
        writer: ChoiceWriter,
        envelope: dict[str, Any],
        body: OpenAIBody,
    ) -> None:
        """`envelope`: see `Chunks`."""
        self._generations = generations
        self._writer = writer
        self._body = body
        self._chunks = Chunks(envelope, wants_usage=body.wants_usage_chunk)
        self._completions: list[Completion] = []

    def write(self, index: int, steps: Sequence[TokenEvent]) -> str:
        """See `EventWriter`."""
        text = ""
        for step in steps:
            choices = self._writer.choices(index, step)
            if step.completion is not None:
                self._completions.append(step.completion)
                text += self._last(choices)
            else:
                text += "".join(map(self._chunks.one, choices))
        return text

    def end(self) -> str:
        """The usage, if it was asked for."""
        if not self._body.wants_usage_chunk:
            return DONE
        counts = usage(self._generations, self._completions, self._body)
        return self._chunks.usage(counts, warnings_field(self._generations)) + DONE

    def failure(self, error: RouterError) -> str:
        """See `EventWriter`."""
        return event(openai_error(error)) + DONE

    def _last(self, choices: Sequence[str]) -> str:
        """The last chunks of a generation; the very last one of a stream has the warnings."""
        is_end = len(self._completions) == len(self._generations)
        if not is_end or self._body.wants_usage_chunk:
            return "".join(map(self._chunks.one, choices))
        *choices, last = choices
        warnings = warnings_field(self._generations)
        return "".join(map(self._chunks.one, choices)) + self._chunks.one(last, warnings)
