"""What a client sends outside of bodies is bounded, in bytes and in time."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from tessera.router.event_stream import EventStream
from tessera.router.http_protocol import GuardedHttp
from tessera.router.main import server_config
from tessera.router.settings import RouterSettings
from tests.router.http_fakes import wait_until

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


async def answer_length(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads the body and says how long it was; /slow takes a while to answer."""
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
    await asyncio.sleep(0.8 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d bytes" % num_bytes})


class Impatient(GuardedHttp):
    read_timeout_s = 0.3
    write_timeout_s = 0.3


@dataclass
class Flood:
    """An app that answers `num_bytes` in pieces and knows when it was let go."""

    num_bytes: int
    ended: bool = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        piece = b"a" * 100_000
        for sent in range(0, self.num_bytes, len(piece)):
            more = sent + len(piece) < self.num_bytes
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        self.ended = True


@contextlib.contextmanager
def connected(
    protocol: type[GuardedHttp] = GuardedHttp, app: Any = answer_length
) -> Iterator[socket.socket]:
    """A connection to a server that speaks `protocol`."""
    config = server_config(app, RouterSettings())
    config.host, config.port, config.http = "127.0.0.1", 0, protocol
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    address = server.servers[0].sockets[0].getsockname()
    try:
        with socket.create_connection(address, timeout=5) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)


def read_to_end(client: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65_536):
            received += piece
    return received


def send_until_refused(client: socket.socket, piece: bytes, times: int) -> None:
    with contextlib.suppress(OSError):
        for _ in range(times):
            client.sendall(piece)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"a" * 1000),
        (HEAD + b"X-Long: ", b"a" * 1000),
        (HEAD, b"a: b\r\n" * 100),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"a: b\r\n" * 100),
    ],
    ids=["url", "header", "headers", "chunk extension", "trailers"],
)
def test_an_endless_head_is_cut_off(start: bytes, piece: bytes) -> None:
    with connected() as client:
        client.sendall(start)
        send_until_refused(client, piece, 3000)
        assert b"200 OK" not in read_to_end(client)


def test_what_is_no_http_is_refused_in_json() -> None:
    with connected() as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        head, _, body = read_to_end(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(body)) == {"error", "error_type"}


@pytest.mark.parametrize("sent", [b"\x00\xff\r\n\r\n", HEAD + b"Bad header\r\n\r\n"])
def test_what_is_no_http_cannot_fill_the_log(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with connected() as client:
        client.sendall(sent)
        assert read_to_end(client).startswith(b"HTTP/1.1 400 ")
    assert "Invalid HTTP request" in caplog.text  # for whoever asks for all there is
    assert not [one for one in caplog.records if one.levelno > logging.INFO]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_there_is_no_other_protocol_to_change_to(
    protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = b"Connection: upgrade, close\r\nUpgrade: " + protocol + b"\r\n"
    with connected() as client:
        client.sendall(HEAD + upgrade + b"Content-Length: 0\r\n\r\n")
        assert read_to_end(client).endswith(b"0 bytes\r\n0\r\n\r\n")
    with connected() as client:
        client.sendall(HEAD + upgrade + b"Content-Length: 2\r\n\r\nab")
        reply = read_to_end(client)
    assert reply.startswith(b"HTTP/1.1 400 ") and b"without the header upgrade" in reply
    assert not [one for one in caplog.records if one.levelno > logging.INFO]


@pytest.mark.parametrize("sent", [b"", b"POST", HEAD + b"Content-Length: 9\r\n\r\n1234"])
def test_a_silent_client_is_dropped(sent: bytes) -> None:
    with connected(Impatient) as client:
        client.sendall(sent)
        assert read_to_end(client) == b""


def test_a_slow_answer_and_a_large_body_are_fine() -> None:
    with connected(Impatient) as client:
        body = b"a" * 3_000_000
        request = b"POST /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        client.sendall(request + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"3000000 bytes" in read_to_end(client)


def test_a_connection_serves_request_after_request() -> None:
    with connected() as client:
        for _ in range(3):
            client.sendall(HEAD + b"Content-Length: 2\r\n\r\nab")
            received = b""
            while b"2 bytes" not in received:
                received += client.recv(65_536)
            assert received.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_is_dropped() -> None:
    flood = Flood(50_000_000)
    with connected(Impatient, flood) as client:
        client.sendall(HEAD + b"\r\n")
        wait_until(lambda: flood.ended, 20)
        assert len(read_to_end(client)) < 50_000_000


def test_a_slow_reader_gets_everything() -> None:
    flood = Flood(20_000_000)
    with connected(Impatient, flood) as client:
        client.sendall(HEAD + b"Connection: close\r\n\r\n")
        received = 0
        while piece := client.recv(1_000_000):
            received += len(piece)
            time.sleep(0.02)
        assert received > 20_000_000


class Numbers:
    """An app that streams `num_events` numbered events of 1 KB, some of them each few turns."""

    def __init__(self, num_events: int) -> None:
        self.num_given = 0
        self.num_ended = 0
        self._num_events = num_events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_given = 0
        await EventStream(self, self._end, {}, 0.05)(scope, receive, send)

    @property
    def is_over(self) -> bool:
        return self.num_given >= self._num_events

    def listen(self, on_news: Callable[[], None]) -> None:
        self._on_news = on_news
        self._come()

    def take(self) -> str:
        if self.is_over:
            return ""
        self.num_given += 1
        return f"data: {self.num_given:1000}\n\n"

    def _come(self) -> None:
        self._on_news()
        if not self.is_over:
            asyncio.get_running_loop().call_later(0 if self.num_given % 50 else 0.01, self._come)

    def _end(self) -> None:
        self.num_ended += 1


def numbers_in(received: bytes) -> list[int]:
    """What an HTTP client makes of it: its events' numbers, in the order they came."""
    place = received.index(b"\r\n\r\n") + 4
    content = []
    while place < len(received):
        size_end = received.index(b"\r\n", place)
        start, size = size_end + 2, int(received[place:size_end], 16)
        content.append(received[start : start + size])
        place = start + size + 2
        assert received[place - 2 : place] == b"\r\n"
    assert content.pop() == b""
    lines = b"".join(content).decode().splitlines()
    return [int(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("pause_s", [0.0, 0.02])
def test_a_stream_is_read_as_it_was_made_however_slowly(pause_s: float) -> None:
    """The slow one lags behind by more than the system keeps for it, again and again."""
    num_pauses = 0

    class Counting(GuardedHttp):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            server_end = transport.get_extra_info("socket")
            server_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)

        def pause_writing(self) -> None:
            nonlocal num_pauses
            num_pauses += 1
            super().pause_writing()

    app = Numbers(8000)
    with connected(Counting, app) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.sendall(HEAD + b"Connection: close\r\n\r\n")
        received = b""
        while piece := client.recv(100_000):
            received += piece
            time.sleep(pause_s)
    assert numbers_in(received) == list(range(1, 8001))
    assert num_pauses > 1 or not pause_s
    assert app.num_ended == 1


def test_two_streams_over_one_connection() -> None:
    """The second is asked for before the first is over."""
    app = Numbers(300)
    with connected(GuardedHttp, app) as client:
        client.sendall((HEAD + b"\r\n") + (HEAD + b"Connection: close\r\n\r\n"))
        received = read_to_end(client)
    first, second = received.split(b"HTTP/1.1 200 OK")[1:]
    assert numbers_in(first) == numbers_in(second) == list(range(1, 301))
    assert app.num_ended == 2


def test_a_stream_that_nobody_reads_ends() -> None:
    app = Numbers(1_000_000)
    with connected(Impatient, app) as client:
        client.sendall(HEAD + b"\r\n")
        wait_until(lambda: app.num_ended == 1, 20)
    assert app.num_given < 100_000


def test_a_stream_whose_client_hangs_up_ends() -> None:
    app = Numbers(1_000_000)
    with connected(GuardedHttp, app) as client:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(100)
        client.close()
        wait_until(lambda: app.num_ended == 1, 20)
