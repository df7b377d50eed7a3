"""Reading one or several generations: to the end, or event by event as they come."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tessera.router.errors import RouterError
from tessera.router.replies import InternalError
from tessera.router.request import Completion, TokenEvent, TokenInfo
from tessera.router.ticket import Generation, Ticket

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Collected:
    """Everything one generation produced."""

    generation: Generation
    completion: Completion
    tokens: list[TokenInfo] = field(default_factory=list)
    top_tokens: list[tuple[TokenInfo, ...]] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """By which best_of chooses; -inf for an empty generation."""
        if not self.tokens:
            return float("-inf")
        return sum(token.logprob for token in self.tokens) / len(self.tokens)


async def collect(generation: Generation) -> Collected:
    """Read one generation to its end. Raises what its events raise."""
    tokens: list[TokenInfo] = []
    top_tokens: list[tuple[TokenInfo, ...]] = []
    completion: Completion | None = None
    while completion is None:
        for event in await generation.next_events():
            tokens.append(event.token)
            top_tokens.append(event.top_tokens)
            completion = event.completion
    return Collected(generation, completion, tokens, top_tokens)


async def collect_all(generations: Sequence[Generation]) -> list[Collected]:
    """Read several at once. The first failure ends the reading and is raised."""
    tasks = [asyncio.ensure_future(collect(generation)) for generation in generations]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class EventWriter(Protocol):
    """Turns the events of one kind of stream into the text of server-sent events."""

    def write(self, index: int, steps: Sequence[TokenEvent]) -> str:
        """What a batch of generation `index` becomes; "" if there is nothing to say yet."""
        ...

    def end(self) -> str:
        """What comes behind the last of all generations; often ""."""
        ...

    def failure(self, error: RouterError) -> str:
        """What comes instead of the rest, `end` included, of a stream that fails."""
        ...


class EventTexts:
    """Implements `event_stream.TextSource`: the events of some generations, as they are written."""

    def __init__(
        self, generations: Sequence[Generation], writer: EventWriter, ticket: Ticket
    ) -> None:
        """`ticket`: is told of a failure, which ends the stream."""
        self._unfinished = list(enumerate(generations))
        self._writer = writer
        self._ticket = ticket
        self._text = ""  # written and not taken yet

    async def start(self) -> None:
        """Wait for the first events, so that a failure before them can still be a status.

        Raises:
            RouterError: a generation failed before its first token.
        """
        news = asyncio.Event()
        self.listen(news.set)
        await news.wait()
        self._write()

    @property
    def is_over(self) -> bool:
        """See `TextSource`."""
        return not self._unfinished and not self._text

    def listen(self, on_news: Callable[[], None]) -> None:
        """See `TextSource`."""
        for _, generation in self._unfinished:
            generation.stream.listen(on_news)

    def take(self) -> str:
        """See `TextSource`."""
        try:
            self._write()
        except RouterError as error:
            self._fail(error)
        except Exception:
            logger.exception("a stream failed")
            self._fail(InternalError())
        text, self._text = self._text, ""
        return text

    def _write(self) -> None:
        """Write what has come; what was written before a failure stays."""
        for entry in tuple(self._unfinished):
            index, generation = entry
            if events := generation.take():
                self._text += self._writer.write(index, events)
                if events[-1].completion is not None:
                    self._unfinished.remove(entry)
                    if not self._unfinished:
                        self._text += self._writer.end()

    def _fail(self, error: RouterError) -> None:
        self._unfinished.clear()
        self._ticket.failed(error)
        self._text += self._writer.failure(error)
