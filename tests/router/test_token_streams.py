"""Reading generations: what comes is read in its order, together where it came together, once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from tessera.router.errors import GenerationError, RouterError
from tessera.router.generation import MOST_AT_ONCE
from tessera.router.in_flight import RequestStream
from tessera.router.request import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    StoppingParams,
    Timings,
    TokenEvent,
    TokenInfo,
)
from tessera.router.sequence import Sequence as ScheduledSequence
from tessera.router.ticket import Generation
from tessera.router.token_streams import EventTexts, collect_all

T = TypeVar("T")
COMPLETION = Completion(FinishReason.LENGTH, "", 1, None, Timings(1.0, 0.0, 0.0, 1.0, 1.0))


class Lines:
    """Writes a line for each event: its generation and its token."""

    def write(self, index: int, steps: Sequence[TokenEvent]) -> str:
        if any(step.token.id == 666 for step in steps):
            raise ValueError("a defect")
        return "".join(f"{index}:{step.token.id}\n" for step in steps)

    def end(self) -> str:
        return "end\n"

    def failure(self, error: RouterError) -> str:
        return f"{error.error_type}\n"


class Failures:
    """As much of a ticket as is needed."""

    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def failed(self, error: BaseException) -> None:
        self.told.append(error)


def event(number: int, *, is_last: bool = False) -> TokenEvent:
    return TokenEvent(TokenInfo(number, "x", -1.0), "x", (), COMPLETION if is_last else None)


def new_generation(completed: list[Completion] | None = None) -> Generation:
    request = Request((1, 2), (), SamplingParams(), StoppingParams(9))
    stream = RequestStream(ScheduledSequence(0, request), cancel=lambda: None)
    return Generation(request, stream, (completed if completed is not None else []).append)


def stream_of(generation: Generation) -> RequestStream:
    assert isinstance(generation.stream, RequestStream)
    return generation.stream


def texts_of(*generations: Generation) -> tuple[EventTexts, Failures]:
    failures: Any = Failures()
    return EventTexts(generations, Lines(), failures), failures


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(work(), 10)

    return asyncio.run(limited())


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_events_are_read_in_their_order_and_only_once() -> None:
    async def go() -> None:
        completed: list[Completion] = []
        generation = new_generation(completed)
        texts, failures = texts_of(generation)
        stream_of(generation).push(event(1))
        await texts.start()
        stream_of(generation).push(event(2))
        assert (texts.take(), texts.take()) == ("0:1\n0:2\n", "")
        assert not texts.is_over and completed == []
        stream_of(generation).push(event(3, is_last=True))
        assert texts.take() == "0:3\nend\n"
        assert texts.is_over and texts.take() == ""
        assert completed == [COMPLETION] and failures.told == []

    run(go)


def test_the_listener_is_called_once_for_what_comes_together() -> None:
    async def go() -> None:
        stream, calls = stream_of(new_generation()), []
        stream.listen(lambda: calls.append(len(stream.take())))
        for number in range(5):
            stream.push(event(number))
        assert calls == []  # never inside of `push`, where a step is waited for
        await turns()
        assert calls == [5]
        stream.push(event(5))
        await turns()
        assert calls == [5, 1]
        stream.close()
        stream.push(event(6))
        await turns()
        assert calls == [5, 1]

    run(go)


def test_what_is_taken_at_once_is_bounded_and_the_rest_is_told_of() -> None:
    async def go() -> None:
        stream = stream_of(new_generation())
        sizes: list[int] = []
        ids: list[int] = []

        def take() -> None:
            events = stream.take()
            sizes.append(len(events))
            ids.extend(one.token.id for one in events)

        for number in range(2 * MOST_AT_ONCE + 1):
            stream.push(event(number))
        stream.listen(take)
        await turns(9)
        assert sizes == [MOST_AT_ONCE, MOST_AT_ONCE, 1]
        assert ids == list(range(2 * MOST_AT_ONCE + 1))

    run(go)


@pytest.mark.parametrize("num_before", [1, MOST_AT_ONCE, MOST_AT_ONCE + 1])
def test_a_failure_comes_behind_the_events_before_it(num_before: int) -> None:
    async def go() -> None:
        generation = new_generation()
        texts, failures = texts_of(generation)
        for number in range(num_before):
            stream_of(generation).push(event(number))
        error = GenerationError("nan")
        stream_of(generation).fail(error)
        await texts.start()
        parts: list[str] = []
        texts.listen(lambda: parts.append(texts.take()))
        await turns(9)
        *events, last = "".join(parts).splitlines()
        assert events == [f"0:{number}" for number in range(num_before)]
        assert last == "generation" and failures.told == [error]
        assert texts.is_over and texts.take() == ""

    run(go)


def test_a_failure_before_the_first_event_is_raised() -> None:
    async def go() -> None:
        generation = new_generation()
        texts, _ = texts_of(generation)
        asyncio.get_running_loop().call_later(
            0.01, stream_of(generation).fail, GenerationError("x")
        )
        with pytest.raises(GenerationError):
            await texts.start()

    run(go)


def test_a_defect_is_told_as_one_and_what_was_written_before_it_stays() -> None:
    async def go() -> None:
        fine, faulty = new_generation(), new_generation()
        texts, failures = texts_of(fine, faulty)
        stream_of(fine).push(event(1))
        await texts.start()
        stream_of(fine).push(event(2))
        stream_of(faulty).push(event(666))
        assert texts.take() == "0:1\n0:2\ninternal\n"
        assert texts.is_over
        assert [type(error).__name__ for error in failures.told] == ["InternalError"]

    run(go)


def test_several_generations_end_with_the_last_of_them() -> None:
    async def go() -> None:
        first, second = new_generation(), new_generation()
        texts, _ = texts_of(first, second)
        stream_of(second).push(event(1))
        await texts.start()
        parts = [texts.take()]
        texts.listen(lambda: parts.append(texts.take()))
        stream_of(second).push(event(2, is_last=True))
        await turns()
        stream_of(first).push(event(3))
        stream_of(first).push(event(4, is_last=True))
        await turns()
        assert parts == ["1:1\n", "1:2\n", "0:3\n0:4\nend\n"]
        assert texts.is_over

    run(go)


def test_all_of_several_are_collected_and_the_first_failure_ends_it() -> None:
    async def go() -> None:
        first, second = new_generation(), new_generation()
        stream_of(first).push(event(1))
        stream_of(second).push(event(2, is_last=True))
        collecting = asyncio.ensure_future(collect_all([first, second]))
        await turns()
        stream_of(first).push(event(3, is_last=True))
        ids = [[token.id for token in one.tokens] for one in await collecting]
        assert ids == [[1, 3], [2]]

        third, fourth = new_generation(), new_generation()
        stream_of(fourth).fail(GenerationError("nan"))
        with pytest.raises(GenerationError):
            await collect_all([third, fourth])

    run(go)
