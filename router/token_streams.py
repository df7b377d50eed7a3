"""Reading one or several generations: to the end, or event by event as they come."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from tessera.router.request import Completion, TokenEvent, TokenInfo
from tessera.router.ticket import Generation


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
    async for event in generation.events:
        tokens.append(event.token)
        top_tokens.append(event.top_tokens)
        completion = event.completion
    assert completion is not None  # `Generation.events` promises it
    return Collected(generation, completion, tokens, top_tokens)


async def collect_all(generations: Sequence[Generation]) -> list[Collected]:
    """Read several at once. The first failure ends the reading and is raised."""
    tasks = [asyncio.ensure_future(collect(generation)) for generation in generations]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def merge(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """(index, event) of several generations, in the order they come. Raises the first failure."""
    if len(generations) == 1:  # the usual case needs no tasks
        async for event in generations[0].events:
            yield 0, event
        return
    pending = {
        asyncio.ensure_future(anext(generation.events)): index
        for index, generation in enumerate(generations)
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                event = task.result()
                if event.completion is None:
                    pending[asyncio.ensure_future(anext(generations[index].events))] = index
                yield index, event
    finally:
        for task in pending:
            task.cancel()
            task.add_done_callback(_forget)


def more_ready(generations: Sequence[Generation]) -> bool:
    """Whether there is another event or error to read without waiting."""
    return any(generation.stream.num_ready for generation in generations)


def _forget(task: "asyncio.Future[TokenEvent]") -> None:
    """Take note of how a task ended, which asyncio would otherwise complain about."""
    if not task.cancelled():
        task.exception()


async def started(
    events: AsyncIterator[tuple[int, TokenEvent]],
) -> AsyncIterator[tuple[int, TokenEvent]]:
    """The same events once the first is known, so that an early failure can still be a status.

    Raises:
        RouterError: the generation failed before its first token.
    """
    first = await anext(events)
    return _chain(first, events)


async def _chain(
    first: tuple[int, TokenEvent], rest: AsyncIterator[tuple[int, TokenEvent]]
) -> AsyncIterator[tuple[int, TokenEvent]]:
    yield first
    async for item in rest:
        yield item
