"""Reading one or several generations: to the end, or event by event as they come."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tessera.router.errors import RouterError
from tessera.router.replies import InternalError
from tessera.router.request import Completion, TokenEvent, TokenInfo
from tessera.router.ticket import Generation, Ticket

logger = logging.getLogger(__name__)

Batch = tuple[int, list[TokenEvent]]
"""The index of a generation, and events of it that came together."""


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


class Reading:
    """The events of several generations, in the order they come."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        """Nothing is read yet. `generations`: at least one."""
        self._single = generations[0] if len(generations) == 1 else None  # it needs no tasks
        self._merged = _merge(generations)
        self._first: Batch | None = None
        self._is_over = False

    async def start(self) -> None:
        """Wait for the first events, so that a failure before them can still be a status.

        Raises:
            RouterError: a generation failed before its first token.
        """
        self._first = await self.next()

    async def next(self) -> Batch | None:
        """Wait for more events; None behind the last one.

        Raises:
            RouterError: a generation failed, and its events before that have been read.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._single is None:
            return await anext(self._merged, None)
        if self._is_over:
            return None
        events = await self._single.next_events()
        self._is_over = events[-1].completion is not None
        return 0, events

    async def close(self) -> None:
        """Read no more, after any call of `next` has ended."""
        await self._merged.aclose()


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
    """Implements `event_stream.TextSource`: what is read, as it is written; a failure ends it."""

    def __init__(self, reading: Reading, writer: EventWriter, ticket: Ticket) -> None:
        """`ticket`: is told of a failure."""
        self._reading = reading
        self._writer = writer
        self._ticket = ticket
        self._is_over = False

    async def next(self) -> str:
        """Wait for the text of one or several events, those that came together; "" at the end."""
        text = ""
        while not text and not self._is_over:
            try:
                batch = await self._reading.next()
                if batch is None:
                    self._is_over = True
                    return self._writer.end()
                text = self._writer.write(*batch)
            except RouterError as error:
                text = self._failure(error)
            except Exception:
                logger.exception("a stream failed")
                text = self._failure(InternalError())
        return text

    async def close(self) -> None:
        """Read no more, after any call of `next` has ended."""
        await self._reading.close()

    def _failure(self, error: RouterError) -> str:
        self._is_over = True
        self._ticket.failed(error)
        return self._writer.failure(error)


async def _merge(generations: Sequence[Generation]) -> AsyncGenerator[Batch, None]:
    pending = {
        asyncio.ensure_future(generation.next_events()): index
        for index, generation in enumerate(generations)
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                events = task.result()
                if events[-1].completion is None:
                    pending[asyncio.ensure_future(generations[index].next_events())] = index
                yield index, events
    finally:
        for task in pending:
            task.cancel()
            task.add_done_callback(_forget)


def _forget(task: "asyncio.Future[list[TokenEvent]]") -> None:
    """Take note of how a task ended, which asyncio would otherwise complain about."""
    if not task.cancelled():
        task.exception()
