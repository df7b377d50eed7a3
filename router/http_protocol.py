"""HTTP/1.1 as uvicorn parses it, with limits on what a client may send outside of bodies."""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tessera.router.errors import MalformedBody
from tessera.router.event_stream import to_json
from tessera.router.replies import native_error

MAX_HEAD_BYTES = 65_536
"""Bytes of a head, of trailers or between two pieces of a body. nginx takes 32 KB."""

READ_TIMEOUT_S = 60.0
"""Until a head must be complete, and between two pieces of a body."""

_REFUSAL_HEAD = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"


class GuardedHttp(HttpToolsProtocol):
    """Closes connections whose head does not end and those that stop in the middle of a request.

    The parser alone would collect an endless head in memory and keep a silent connection for ever.
    `middleware.BodyLimit` bounds the bodies.
    """

    read_timeout_s = READ_TIMEOUT_S
    _num_unread = 0  # bytes since the parser last made something of them
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; its first head is awaited."""
        super().connection_made(transport)
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, then look at how much of it led to nothing."""
        if self._timer is None:  # the beginning of another head
            self._restart_timer()
        self._num_unread += len(data)
        super().data_received(data)
        if self._num_unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        """The head is there; a body may follow."""
        self._num_unread = 0
        self._restart_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of the body is there."""
        self._num_unread = 0
        self._restart_timer()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing more is awaited for this request."""
        self._num_unread = 0
        self._stop_timer()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the shape of every other refusal."""
        if not self._is_answering():  # else it would look like a part of the answer
            content = to_json(native_error(MalformedBody(msg))).encode("ascii")
            self.transport.write(STATUS_LINE[400] + _REFUSAL_HEAD % len(content) + content)
        self.transport.close()

    def _is_answering(self) -> bool:
        """Whether a request that was read to its end has no complete answer yet."""
        cycle = self.cycle
        return bool(self.pipeline) or (
            cycle is not None and not cycle.more_body and not cycle.response_complete
        )

    def _restart_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.read_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self._is_answering():
            self._restart_timer()
        else:
            self.transport.close()
