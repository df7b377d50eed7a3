"""Streams of the OpenAI routes: from the events of generations to chunks.

All chunks of a stream share everything but their choice, so that part is written once.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from tessera.router.errors import RouterError
from tessera.router.event_stream import DONE, event, to_json
from tessera.router.notices import warnings_field
from tessera.router.openai_usage import usage
from tessera.router.replies import InternalError, openai_error
from tessera.router.request import TokenEvent
from tessera.router.schemas import OpenAIBody
from tessera.router.ticket import Generation, Ticket
from tessera.router.token_streams import Reading

logger = logging.getLogger(__name__)


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


async def chunk_events(
    reading: Reading,
    generations: Sequence[Generation],
    ticket: Ticket,
    writer: ChoiceWriter,
    chunks: Chunks,
    body: OpenAIBody,
) -> AsyncGenerator[str, None]:
    """The text of the events. Always ends with [DONE], after a failure too, as clients expect."""
    completions = []
    try:
        async for index, steps in reading:
            text = ""
            for step in steps:
                choices = writer.choices(index, step)
                if step.completion is not None:
                    completions.append(step.completion)
                if len(completions) < len(generations) or body.wants_usage_chunk:
                    text += "".join(map(chunks.one, choices))
                else:
                    *choices, last = choices
                    warnings = warnings_field(generations)
                    text += "".join(map(chunks.one, choices)) + chunks.one(last, warnings)
            if text:
                yield text
        if body.wants_usage_chunk:
            counts = usage(generations, completions, body)
            yield chunks.usage(counts, warnings_field(generations))
    except RouterError as error:
        ticket.failed(error)
        yield event(openai_error(error))
    except Exception as error:
        logger.exception("a stream failed")
        ticket.failed(error)
        yield event(openai_error(InternalError()))
    yield DONE
