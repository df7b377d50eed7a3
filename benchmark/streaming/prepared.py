"""A generator that has every token ready, or one for every stream in each step of a clock."""

import asyncio
from collections.abc import Iterator

from tessera.router.generation import ServingLimits
from tessera.router.in_flight import RequestStream
from tessera.router.request import (
    Completion,
    FinishReason,
    Request,
    Timings,
    TokenEvent,
    TokenInfo,
)
from tessera.router.sequence import Sequence

WORDS = (" the", " picture", " shows", " a", " dog", ",", " \u00fcber", ' "quoted"', "\n", "ing")
LIMITS = ServingLimits(8192, 16384, 4096, 1 << 20, 256, num_shard=1, dtype="float32", device="cpu")
TIMINGS = Timings(total=0.5, validation=0.1, queue=0.05, inference=0.3, first_token=0.2)


def prepared_events(count: int, top_n: int = 0) -> list[TokenEvent]:
    """`count` events like those of a model, the last with the completion."""
    return [
        TokenEvent(
            _token(n, 0),
            WORDS[n % len(WORDS)],
            tuple(_token(n, k) for k in range(1, top_n + 1)),
            _completion(count) if n == count - 1 else None,
        )
        for n in range(count)
    ]


def _token(n: int, rank: int) -> TokenInfo:
    text = WORDS[(n + rank) % len(WORDS)]
    # A float32 as Python prints it, 16 or 17 digits, as the shards send them.
    return TokenInfo(1000 + 17 * n, text, -0.123456789012345 * (1 + rank) - n / 7, False)


def _completion(count: int) -> Completion:
    text = "".join(WORDS[n % len(WORDS)] for n in range(count))
    return Completion(FinishReason.LENGTH, text, count, None, TIMINGS)


class PreparedGenerator:
    """Implements `generation.Generator` over streams of the router's own."""

    limits = LIMITS
    ready = takes_requests = True

    def __init__(self, step_s: float) -> None:
        """With `step_s` 0 all events are there at once, else one for each stream every `step_s`."""
        self._step_s = step_s
        self._waiting: dict[RequestStream, Iterator[TokenEvent]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._prepared: dict[tuple[int, int], list[TokenEvent]] = {}

    def submit(self, request: Request) -> RequestStream:
        """Answer with `max_new_tokens` events."""
        key = request.stopping.max_new_tokens, request.sampling.top_n_tokens
        events = self._prepared.get(key) or prepared_events(*key)
        self._prepared[key] = events
        stream = RequestStream(Sequence(0, request), cancel=lambda: None)
        if self._step_s:
            self._waiting[stream] = iter(events)
            if self._stepping is None:
                self._stepping = asyncio.ensure_future(self._step())
        else:
            for event in events:
                stream.push(event)
        return stream

    async def _step(self) -> None:
        """One event for every stream, again and again while there are any."""
        while self._waiting:
            for stream, events in list(self._waiting.items()):
                event = next(events)
                stream.push(event)
                if event.completion is not None:
                    del self._waiting[stream]
            await asyncio.sleep(self._step_s)
        self._stepping = None
