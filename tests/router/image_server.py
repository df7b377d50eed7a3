"""A small web server that answers like good, clumsy and hostile ones."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.router.http_fakes import wait_until

DRIP_S = 0.05
LONGEST_S = 20.0  # no answer takes longer, whatever a test forgets
OK = b"HTTP/1.1 200 OK\r\n"


def reply(
    body: bytes, *headers: str, status: str = "200 OK", length: int | None = None
) -> list[bytes]:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    return ["\r\n".join([*lines, *headers, "", ""]).encode(), body]


def redirect(location: str) -> list[bytes]:
    return reply(b"", f"Location: {location}", status="302 Found")


@dataclass
class ImageServer:
    """Answers by path; notes what it was asked."""

    replies: dict[str, list[bytes]] = field(default_factory=dict)  # sent one after another
    endless: dict[str, tuple[bytes, bytes, float]] = field(default_factory=dict)
    """Path to a head, a piece that is sent again and again, and the seconds between."""
    requests: list[str] = field(default_factory=list)  # whole heads
    open_connections: int = 0
    most_connections: int = 0
    port: int = 0
    tls: ssl.SSLContext | None = None
    stopped: threading.Event = field(default_factory=threading.Event)  # ends endless answers

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    @property
    def paths(self) -> list[str]:
        return [request.split(" ")[1] for request in self.requests]

    def serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        self.open_connections += 1
        self.most_connections = max(self.most_connections, self.open_connections)
        try:
            connection.settimeout(LONGEST_S)
            with contextlib.suppress(OSError), self._secured(connection) as connection:
                head = b""
                while b"\r\n\r\n" not in head and (part := connection.recv(65536)):
                    head += part
                if head:
                    self.requests.append(head.decode())
                    self._send(connection, head.split(b" ")[1].decode())
        finally:
            self.open_connections -= 1

    def _secured(self, connection: socket.socket) -> socket.socket:
        if self.tls is None:
            return connection
        return self.tls.wrap_socket(connection, server_side=True)

    def _send(self, connection: socket.socket, path: str) -> None:
        for part in self.replies.get(path, []):
            connection.sendall(part)
        if path in self.endless:
            head, piece, pause_s = self.endless[path]
            connection.sendall(head)
            end = time.monotonic() + LONGEST_S
            while time.monotonic() < end and not self.stopped.wait(pause_s):
                connection.sendall(piece)


@contextlib.contextmanager
def image_server(tls: ssl.SSLContext | None = None) -> Iterator[ImageServer]:
    server = ImageServer(tls=tls)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
        thread.start()
        yield server
        server.stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    wait_until(lambda: server.open_connections == 0)
