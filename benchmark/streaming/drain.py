"""A client that does nothing but read: raw sockets, bytes and events counted."""

import selectors
import socket
from collections.abc import Sequence
from dataclasses import dataclass

MARK = b"data: "
LAST_CHUNK = b"0\r\n\r\n"
TIMEOUT_S = 60.0


@dataclass
class Drained:
    """What came over one or several connections, framing and heads included."""

    num_events: int = 0
    num_bytes: int = 0


class _Reply:
    """One chunked reply as it arrives."""

    def __init__(self) -> None:
        self._tail = b""  # the end of what was read before: a mark may lie across two reads

    def take(self, data: memoryview, into: Drained) -> bool:
        """Count `data`; returns whether the reply is complete."""
        seen = self._tail + data
        into.num_bytes += len(data)
        into.num_events += seen.count(MARK)
        self._tail = seen[-len(MARK) + 1 :]
        return self._tail.endswith(LAST_CHUNK)


def post_bytes(path: str, body: bytes) -> bytes:
    """An HTTP/1.1 request."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def drain(port: int, requests: Sequence[bytes]) -> Drained:
    """Send each request over a connection of its own, read all replies at once to their ends.

    Raises:
        TimeoutError: nothing came for a minute.
        ConnectionError: a reply was refused or cut off.
    """
    drained = Drained()
    buffer = bytearray(1 << 18)
    with selectors.DefaultSelector() as selector:
        for request in requests:
            connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, _Reply())
        while selector.get_map():
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise TimeoutError("the server has fallen silent")
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                count = key.fileobj.recv_into(buffer)
                if not count or (buffer.startswith(b"HTTP/") and buffer[9:12] != b"200"):
                    raise ConnectionError(buffer[: min(count, 300)].decode("ascii", "replace"))
                data = memoryview(buffer)[:count]
                if key.data.take(data, drained):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return drained


def get(port: int, path: str) -> str:
    """The body of a short reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    return reply.partition(b"\r\n\r\n")[2].decode()
