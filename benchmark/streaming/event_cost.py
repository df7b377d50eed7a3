"""What it costs to make the text of one event, without a server around it."""

import time
from collections.abc import Callable

from benchmark.streaming.prepared import prepared_events
from tessera.router.chat_replies import ChatWriter
from tessera.router.event_stream import json_event
from tessera.router.native_replies import plain_event
from tessera.router.openai_stream import Chunks
from tessera.router.request import TokenEvent
from tessera.router.schemas import ChatBody

COUNT = 2000
REPEATS = 15
ENVELOPE = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "organisation/model-7b",
    "system_fingerprint": "1.0.0-native",
}

Write = Callable[[int, TokenEvent], str]


def event_costs_us() -> dict[str, float]:
    """Processor microseconds per event, the best of several repetitions, by kind of stream."""
    return {
        "generate_stream": _cost_us(_native(top_n=0), top_n=0),
        "generate_stream, top 5": _cost_us(_native(top_n=5), top_n=5),
        "chat": _cost_us(_chat(logprobs=False), top_n=0),
        "chat, logprobs": _cost_us(_chat(logprobs=True), top_n=0),
        "chat, logprobs, top 5": _cost_us(_chat(logprobs=True), top_n=5),
    }


def _native(top_n: int) -> Write:
    return lambda n, step: json_event(plain_event(n, step, wants_top=top_n > 0))


def _chat(logprobs: bool) -> Write:
    body = ChatBody.model_validate(
        {"messages": [{"role": "user", "content": "Hello"}], "logprobs": logprobs}
    )
    writer, chunks = ChatWriter(body), Chunks(ENVELOPE, wants_usage=False)
    return lambda _, step: "".join(map(chunks.one, writer.choices(0, step)))


def _cost_us(write: Write, top_n: int) -> float:
    events = prepared_events(COUNT + 1, top_n)[:-1]
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        for n, step in enumerate(events):
            write(n, step).encode("ascii")
        best = min(best, time.process_time() - start)
    return round(best / COUNT * 1e6, 2)
