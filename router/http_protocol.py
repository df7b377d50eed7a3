"""HTTP/1.1 as uvicorn parses it, with limits on heads, on silence and on what waits to be read."""

import asyncio
import logging
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from tessera.router.errors import MalformedBody
from tessera.router.event_stream import WRITE_NOW, to_json
from tessera.router.replies import native_error

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536
"""Bytes of a head, of trailers or between two pieces of a body. nginx takes 32 KB."""

READ_TIMEOUT_S = 60.0
"""Until a head must be complete, and between two pieces of a body."""

WRITE_TIMEOUT_S = 60.0
"""For a client to read `MIN_READ_BYTES` of what waits for it, or all of it if that is less."""

MIN_READ_BYTES = 65_536

_REFUSAL_HEAD = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"


class GuardedHttp(HttpToolsProtocol):
    """Closes connections whose head does not end, that stop in a request, or that do not read.

    The parser alone would collect an endless head in memory and keep a silent connection for ever;
    a client that does not read its answer would keep its place in the server as long as it likes.
    `middleware.BodyLimit` bounds the bodies.
    """

    read_timeout_s = READ_TIMEOUT_S
    write_timeout_s = WRITE_TIMEOUT_S
    _num_unread = 0  # bytes since the parser last made something of them
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; its first head is awaited."""
        super().connection_made(transport)
        self.logger = _CalmLog(logger)  # type: ignore[assignment]  # as far as it is used
        # Nothing may wait unnoticed: writing counts as paused as soon as the system takes no more.
        transport.set_write_buffer_limits(0)
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._restart_write_timer()

    def resume_writing(self) -> None:
        """The client has read all there was."""
        self._stop_write_timer()
        super().resume_writing()

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
        if self.parser.should_upgrade() and self._has_body():  # which the parser would pass over
            self.send_400_response("Send requests with a body without the header upgrade.")
            return
        super().on_headers_complete()
        self.scope["state"][WRITE_NOW] = partial(_write_now, self.cycle)

    def on_body(self, body: bytes) -> None:
        """Some of the body is there."""
        self._num_unread = 0
        self._restart_timer()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing more is awaited for this request."""
        self._num_unread = 0
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the shape of every other refusal."""
        if not self._is_answering():  # else it would look like a part of the answer
            content = to_json(native_error(MalformedBody(msg))).encode("ascii")
            self.transport.write(STATUS_LINE[400] + _REFUSAL_HEAD % len(content) + content)
        self.transport.close()

    def _has_body(self) -> bool:
        lengths = (b"content-length", b"transfer-encoding")
        return any(name in lengths and value != b"0" for name, value in self.headers)

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

    def _restart_write_timer(self) -> None:
        self._stop_write_timer()
        waiting = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(
            self.write_timeout_s, self._on_write_timeout, waiting
        )

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_write_timeout(self, waited: int) -> None:
        """Go on waiting for a client that reads; the handlers of others see it disconnect."""
        if waited - self.transport.get_write_buffer_size() >= MIN_READ_BYTES:
            self._restart_write_timer()
        else:
            self.transport.abort()


def _write_now(cycle: RequestResponseCycle, content: bytes) -> bool:
    """`event_stream.WriteNow`: what `send` does, without its layers."""
    if not cycle.chunked_encoding or cycle.flow.write_paused or cycle.disconnected:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(content), content))
    return True


class _CalmLog(logging.LoggerAdapter[logging.Logger]):
    """What uvicorn warns of is what clients sent; they must not be able to fill the log with it."""

    @property
    def level(self) -> int:
        return self.getEffectiveLevel()

    def warning(self, msg: object, *args: object, **options: Any) -> None:
        self.debug(msg, *args, **options)
