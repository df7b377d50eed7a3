"""Server-sent events that end with the client, and a way to notice that a client has left."""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b":\n\n"
DONE = "data: [DONE]\n\n"

WriteNow = Callable[[bytes], bool]
"""Writes a piece of a body whose head has been sent, unless something before it still waits for the
client. Returns whether it did."""

WRITE_NOW = "write_now"
"""Where the server leaves a request's `WriteNow` in its state."""

# Made once: `json.dumps` makes one for every call.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)
_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would otherwise collect events into larger pieces
}


def to_json(value: Any) -> str:
    """Compact JSON in ASCII.

    ASCII because line readers of common clients also break lines at U+2028 and U+0085, which JSON
    does not escape by itself, and would then see half an event.

    Raises:
        ValueError: `value` holds a NaN or an infinity; pass those through `finite` first.
    """
    return _ENCODER.encode(value)


text_to_json: Callable[[str], str] = encode_basestring_ascii
"""`to_json` of a text at a third of the cost."""


def number_to_json(value: float) -> str:
    """`to_json` of a finite number at a tenth of the cost, or `null`."""
    return float.__repr__(value) if math.isfinite(value) else "null"


def finite(value: float) -> float | None:
    """`value`, or None (JSON's null) where JSON has no number for it."""
    return value if math.isfinite(value) else None


def event(payload: Any) -> str:
    """One server-sent event."""
    return json_event(to_json(payload))


def json_event(payload: str) -> str:
    """One server-sent event with what is JSON already, as `to_json` writes it."""
    return f"data: {payload}\n\n"


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first.

    The body must have been read before.

    Raises:
        ClientDisconnect: the client hung up.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _cancel(working, leaving)


class TextSource(Protocol):
    """What an `EventStream` sends."""

    @property
    def is_over(self) -> bool:
        """Whether everything was taken."""
        ...

    def listen(self, on_news: Callable[[], None]) -> None:
        """Have a function called, by the event loop, whenever more has come to `take`."""
        ...

    def take(self) -> str:
        """The events that are ready, "" for none."""
        ...


class EventStream(Response):
    """Sends events as they come; whatever ends it, `on_end` is called exactly once.

    Servers tell in two ways that a client is gone, by an `http.disconnect` message or by an error
    from `send`; either ends the stream at once, also while no event is due. After `keep_alive_s`
    seconds of silence a comment goes out so that proxies do not take the connection for dead.

    Where the server offers `WRITE_NOW`, events are written right when the loop tells of them. A
    task sends what has to wait for a slow client, the comments and the end.
    """

    def __init__(
        self,
        texts: TextSource,
        on_end: Callable[[], None],
        headers: dict[str, str],
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        """Nothing is sent yet."""
        super().__init__(headers=headers | _HEADERS)
        # The base class has announced an empty body.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._texts = texts
        self._on_end = on_end
        self._keep_alive_s = keep_alive_s
        self._write_now: WriteNow = _never
        self._last_sent = 0.0
        # Wakes the task; None while it is awake. What has to be sent, or what went wrong.
        self._attention: asyncio.Future[bytes | Exception] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        self._write_now = scope.get("state", {}).get(WRITE_NOW, _never)
        parts = [
            asyncio.ensure_future(self._send_all(send)),
            asyncio.ensure_future(_client_left(receive)),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        except OSError:
            pass  # the client is gone; there is nobody to tell
        finally:
            self._attention = None
            self._on_end()
            await _cancel(*parts)

    async def _send_all(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        self._last_sent = time.monotonic()
        self._texts.listen(self._on_news)
        while not self._texts.is_over:
            if content := await self._next_to_send():
                await send({"type": "http.response.body", "body": content, "more_body": True})
                self._last_sent = time.monotonic()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next_to_send(self) -> bytes:
        """Sleep until there is something for the task to send, perhaps nothing but the end."""
        attention: asyncio.Future[bytes | Exception] = asyncio.get_running_loop().create_future()
        self._attention = attention
        self._on_news()
        await asyncio.wait((attention,), timeout=self._silence_left_s())
        self._attention = None
        if not attention.done():
            return b"" if self._silence_left_s() > 0 else KEEP_ALIVE
        why = attention.result()
        if isinstance(why, Exception):
            raise why
        return why

    def _silence_left_s(self) -> float:
        return self._last_sent + self._keep_alive_s - time.monotonic()

    def _on_news(self) -> None:
        """Write what is ready, or wake the task for it."""
        if (attention := self._attention) is None:
            return  # it is awake and will look for itself
        why: bytes | Exception
        try:
            why = self._texts.take().encode("ascii")
            if why and self._write_now(why):
                self._last_sent = time.monotonic()
                why = b""
        except Exception as error:
            why = error
        if why or self._texts.is_over:
            attention.set_result(why)
            self._attention = None


def _never(_: bytes) -> bool:
    return False


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what still runs and wait for it, so that nothing outlives its request."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
