"""Reading one or several generations: to the end, or event by event as they come."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass, field

from tessera.router.request import Completion, TokenEvent, TokenInfo
from tessera.router.ticket import Generation

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


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[Batch, None]:
    """The events of several generations, in the order they come. Raises the first failure."""
    if len(generations) == 1:  # the usual case needs no tasks
        is_over = False
        while not is_over:
            events = await generations[0].next_events()
            is_over = events[-1].completion is not None
            yield 0, events
        return
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


class Reading:
    """Generations event by event, in the order the events come."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._batches = merge(generations)
        self._first: Batch | None = None

    async def start(self) -> None:
        """Wait for the first events, so that a failure before them can still be a status.

        Raises:
            RouterError: a generation failed before its first token.
        """
        self._first = await anext(self._batches)

    def __aiter__(self) -> "Reading":
        return self

    def __anext__(self) -> Awaitable[Batch]:
        if self._first is None:
            return anext(self._batches)
        first, self._first = self._first, None
        return _known(first)


async def _known(batch: Batch) -> Batch:
    return batch
