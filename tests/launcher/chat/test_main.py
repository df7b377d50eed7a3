"""tessera-chat against servers that misbehave, or are not there."""

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletionChunk

from tessera.launcher.chat import server as chat_server
from tessera.launcher.chat.main import main
from tessera.launcher.chat.terminal import harmless, numbers

USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "total_tokens": 11,
    "prompt_tokens_details": {"image_tokens": 5, "cached_tokens": 4},
}
Serve = Callable[..., str]


def chunk(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(chunk, ...)`: the address of a server that streams those; strings go out raw."""
    servers: list[ThreadingHTTPServer] = []

    def start(*events: object, status: int = 200, models: object = None, key: str = "") -> str:
        named = {"object": "list", "data": [{"id": "m"}]} if models is None else models

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if key and self.headers["authorization"] != f"Bearer {key}":
                    refusal = {"error": {"message": "This server needs a key."}}
                    self.reply(401, "application/json", json.dumps(refusal))
                    return
                kind = "text/html" if isinstance(named, str) else "application/json"
                self.reply(200, kind, named if isinstance(named, str) else json.dumps(named))

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                if status != 200:
                    self.reply(status, "application/json", json.dumps(events[0]))
                    return
                lines = (one if isinstance(one, str) else json.dumps(one) for one in events)
                self.reply(200, "text/event-stream", "".join(f"data: {x}\n\n" for x in lines))

            def reply(self, status: int, kind: str, body: str) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_answer_numbers_and_warnings(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    last = {"choices": [], "usage": USAGE, "warnings": ["It was scaled."]}
    url = serve(chunk(" Three"), chunk(" shapes."), last, "[DONE]")
    code, out, err = run(capsys, "--url", f"{url}/v1/", "How", "many?")
    assert (code, out) == (0, "Three shapes.\n")
    assert re.search(r"2 tokens in .* · prompt 9 · image 5 · cached 4", err)
    assert "It was scaled." in err


def test_tokens_per_second_are_those_of_the_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 12.5, 14.0])
    monkeypatch.setattr(chat_server, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    last = {"choices": [], "usage": USAGE | {"completion_tokens": 12}}
    frame = {"id": "1", "created": 0, "model": "m", "object": "chat.completion.chunk"}
    events = (frame | event for event in (chunk(" Three"), chunk(" shapes."), last))
    answer = chat_server.Answer(map(ChatCompletionChunk.model_validate, events))
    assert "".join(answer) == "Three shapes."
    assert numbers(answer)[:2] == ["first token 2.00 s", "12 tokens in 4.00 s (3.0 tokens/s)"]


def test_the_key_is_sent(
    serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve({"choices": [], "usage": USAGE}, key="Secret")
    code, _, err = run(capsys, "--url", url, "Hello")
    assert code == 1 and "This server needs a key" in err
    assert run(capsys, "--url", url, "--api-key", "Secret", "Hello")[0] == 0
    monkeypatch.setenv("API_KEY", "Secret")
    assert run(capsys, "--url", url, "Hello")[0] == 0


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    code, out, err = run(capsys, "--url", url, "Hello")
    assert (code, out) == (1, "")
    assert err == f"Error: no server answers at {url}; is it running there?\n"


@pytest.mark.parametrize("url", ["localhost:3000", "", "http://[::", "http://a:b", "ftp://a/"])
def test_no_address_is_one_line(capsys: pytest.CaptureFixture[str], url: str) -> None:
    code, _, err = run(capsys, "--url", url, "Hello")
    assert code == 1 and "is no address" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("events", "status", "told"),
    [
        ([{"error": {"message": "Too long."}}], 422, "Too long."),
        ([{"oops": 1}], 502, "the server answered with status 502."),
        ([chunk("a"), {"error": {"message": "A shard died."}}, "[DONE]"], 200, "A shard died."),
        ([chunk("a")], 200, "the connection was lost before the answer was complete."),
        ([chunk("a"), "{"], 200, "gave an answer that cannot be read."),
    ],
)
def test_failures_are_one_line(
    serve: Serve, capsys: pytest.CaptureFixture[str], events: list[object], status: int, told: str
) -> None:
    code, out, err = run(capsys, "--url", serve(*events, status=status), "Hello")
    assert (code, out) == (1, "a\n" if status == 200 else "")
    assert err.startswith("Error: ") and err.endswith(f"{told}\n") and err.count("\n") == 1


@pytest.mark.parametrize("models", ["<html>Welcome!</html>", {"data": []}, {"hello": "world"}])
def test_something_else_answers(
    serve: Serve, capsys: pytest.CaptureFixture[str], models: object
) -> None:
    code, _, err = run(capsys, "--url", serve(models=models), "Hello")
    assert code == 1 and "is no server of this kind" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--image", "/no/such.png", "x"], "/no/such.png: No such file or directory"),
        (["--api-key", "\u00e4", "x"], "characters that no key can have"),
    ],
)
def test_wrong_arguments(
    serve: Serve, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    code, _, err = run(capsys, "--url", serve(), *arguments)
    assert code == 1 and told in err and err.count("\n") == 1


def test_an_installation_without_the_client(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "tessera.launcher.chat.server")
    code, _, err = run(capsys, "Hello")
    assert code == 1
    assert err == "Error: tessera-chat needs openai; pip install 'tessera[client]' has it.\n"


def test_an_answer_cannot_drive_the_terminal() -> None:
    hostile = "a\x1b]52;c;aGk=\x07b\x9b2Jc\td\ne\rf"
    assert harmless(hostile) == "a\ufffd]52;c;aGk=\ufffdb\ufffd2Jc\td\ne\ufffdf"
