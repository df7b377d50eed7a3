"""Sends the conversations of a workload and notes when what came."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmark.load.arrivals import dealt
from benchmark.load.protocol import Api, Exchange, parse_event
from benchmark.load.workload import Conversation, Turn

Clock = Callable[[], float]


@dataclass
class Record:
    """One request. Times are seconds of the client's clock."""

    due_at: float  # when it should have been sent
    sent_at: float = 0.0
    text_times: list[float] = field(default_factory=list)  # of events that brought text
    ended_at: float = 0.0
    num_tokens: int = 0  # as the server counts, else events with text
    answer: str = ""
    error: str = ""  # its kind; empty: it was answered


class Client:
    """Asks one server through one of its APIs."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        address: str,
        api: Api,
        *,
        max_tokens: int,
        extra: dict[str, Any] | None = None,
        clock: Clock = time.perf_counter,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """`address`: scheme, host and port. `extra`: more fields of every body."""
        self._session = session
        self._url = address.rstrip("/") + api.path
        self._api = api
        self._max_tokens = max_tokens
        self._extra = extra or {}
        self._clock = clock
        self._on_end = on_end
        self.records: list[Record] = []

    async def open_loop(
        self, conversations: Sequence[Conversation], times_s: Sequence[float]
    ) -> None:
        """Begin each conversation at its time, whatever has become of those before it."""
        began = self._clock()

        async def one(conversation: Conversation, at_s: float) -> None:
            await asyncio.sleep(max(0.0, began + at_s - self._clock()))
            await self._converse(conversation, began + at_s)

        async with asyncio.TaskGroup() as tasks:
            for conversation, at_s in zip(conversations, times_s, strict=True):
                tasks.create_task(one(conversation, at_s))

    async def closed_loop(self, conversations: Sequence[Conversation], concurrency: int) -> None:
        """Keep `concurrency` conversations going until all are done."""

        async def hand(numbers: Sequence[int]) -> None:
            for number in numbers:
                await self._converse(conversations[number], self._clock())

        async with asyncio.TaskGroup() as tasks:
            for numbers in dealt(len(conversations), concurrency):
                tasks.create_task(hand(numbers))

    async def _converse(self, conversation: Conversation, due_at: float) -> None:
        """All turns; a turn that fails is the last."""
        past: list[Exchange] = []
        for turn in conversation.turns:
            record = await self._ask(conversation.system, past, turn, due_at)
            if record.error:
                return
            past.append(Exchange(turn, record.answer))
            due_at = self._clock()

    async def _ask(
        self, system: str, past: Sequence[Exchange], turn: Turn, due_at: float
    ) -> Record:
        body = self._api.body(system, past, turn, self._max_tokens) | self._extra
        record = Record(due_at, sent_at=self._clock())
        self.records.append(record)
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    record.error = f"status {response.status}"
                else:
                    await self._read(response, record)
        except TimeoutError:
            record.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            record.error = type(error).__name__
        except (ValueError, TypeError, AttributeError):
            record.error = "unreadable event"
        record.ended_at = self._clock()
        self._on_end(record)
        return record

    async def _read(self, response: aiohttp.ClientResponse, record: Record) -> None:
        pieces, counted = [], None
        async for line in response.content:
            event = parse_event(line)
            if event is None:
                continue
            heard = self._api.read(event)
            if heard.error:
                record.error = heard.error
                break
            if heard.text:
                record.text_times.append(self._clock())
                pieces.append(heard.text)
            counted = heard.num_tokens or counted
        record.answer = "".join(pieces)
        record.num_tokens = counted or len(pieces)
        if not record.error and counted is None and not pieces:
            record.error = "empty answer"


def read_extra(text: str) -> dict[str, Any]:
    """More fields for bodies, from JSON.

    Raises:
        ValueError: it is no JSON object.
    """
    extra = json.loads(text)
    if not isinstance(extra, dict):
        raise ValueError("it must be a JSON object")
    return extra
