import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tessera.launcher import health


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """Answers `/health` with `server.status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = vars(self.server)["status"] if self.path == "/health" else 404
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("hostname", ["", "0.0.0.0", "127.0.0.1", "3f2a9c0d1b2e", "::"])
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_exit_code_is_the_server_s_health(
    server: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hostname: str,
    status: int,
    code: int,
) -> None:
    vars(server)["status"] = status
    monkeypatch.setenv("PORT", str(server.server_address[1]))
    monkeypatch.setenv("HOSTNAME", hostname)
    assert health.main() == code
    assert ("/health answers 503" in capsys.readouterr().err) == bool(code)


def test_nobody_there(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", "1")
    monkeypatch.delenv("HOSTNAME", raising=False)
    assert health.main() == 1
    assert "not healthy: port 1:" in capsys.readouterr().err


def test_a_port_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    assert health.main() == 1
