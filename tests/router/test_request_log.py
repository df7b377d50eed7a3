"""The line that each request leaves in the log."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.proto.logs import FIELDS, JsonFormatter, TextFormatter
from tessera.router.errors import GenerationError
from tests.end_to_end.asking import png
from tests.router.http_fakes import FakeGenerator, Script, call, disconnecting, post

App = Callable[..., Starlette]
LOGGER = "tessera.router.request_log"


class Lines:
    """The lines about requests so far."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def records(self) -> list[logging.LogRecord]:
        return [record for record in self._caplog.records if record.name == LOGGER]

    def only(self) -> tuple[str, dict[str, Any]]:
        """Level and fields of the one line there is."""
        (record,) = self.records
        assert record.getMessage() == "request finished"
        return record.levelname, getattr(record, FIELDS)

    @property
    def text(self) -> str:
        """Everything that was logged but by the test's own client, as text and as JSON."""
        records = [record for record in self._caplog.records if record.name != "httpx"]
        formatters = TextFormatter(), JsonFormatter()
        return "\n".join(form.format(record) for form in formatters for record in records)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO)
    return Lines(caplog)


def test_a_generation_has_one_line_with_counts_and_times(text_app: App, lines: Lines) -> None:
    body = {"inputs": "Private words", "parameters": {"max_new_tokens": 3}}
    headers = {"x-request-id": "one", "authorization": "Bearer sesame"}
    post(text_app(api_key="sesame"), "/generate", body, headers=headers)
    level, fields = lines.only()
    assert level == "INFO"
    times = {name: fields.pop(name) for name in list(fields) if name.endswith("_s")}
    assert set(times) == {"validation_s", "queue_s", "first_token_s", "total_s"}
    assert 0 < times["validation_s"] <= times["first_token_s"] <= times["total_s"]
    assert fields.pop("prompt_tokens") > 2
    assert fields == {
        "request_id": "one",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "image_tokens": 0,
        "cached_tokens": 3,
        "generated_tokens": 3,
        "finish_reason": "length",
    }
    for secret in ("Private", "words", "Hel", "sesame"):
        assert secret not in lines.text


def test_what_is_asked_by_pictures_is_counted_and_not_shown(vision_app: App, lines: Lines) -> None:
    picture = png(40, 30, seed=1)
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "Private?"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "n": 2, "user": "somebody"}
    reply = post(
        vision_app(), "/v1/chat/completions", body, headers={"authorization": "Bearer k3y"}
    )
    assert reply.status_code == 200, reply.text
    _, fields = lines.only()
    usage = reply.json()["usage"]
    assert fields["route"] == "/v1/chat/completions"
    assert fields["prompt_tokens"] == usage["prompt_tokens"]  # once, for both answers
    assert fields["image_tokens"] == usage["prompt_tokens_details"]["image_tokens"] > 0
    assert fields["generated_tokens"] == usage["completion_tokens"] == 6
    assert fields["finish_reason"] == "length,length"
    for secret in (picture[:40], "Private", "k3y", "somebody"):
        assert secret not in lines.text


def test_a_stream_has_its_line_at_its_end(text_app: App, lines: Lines) -> None:
    async def go() -> None:
        app = text_app(FakeGenerator(Script(delay_s=0.02)))
        body = json.dumps({"inputs": "x"}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[int] = []  # lines there were when each message was sent

        async def receive() -> dict[str, Any]:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message: dict[str, Any]) -> None:
            sent.append(len(lines.records))

        await app(_scope("/generate_stream"), receive, send)
        assert len(sent) > 3 and not any(sent)

    asyncio.run(go())
    level, fields = lines.only()
    assert (level, fields["status"], fields["generated_tokens"]) == ("INFO", 200, 3)
    assert fields["finish_reason"] == "length"


@pytest.mark.parametrize("receive_says_so", [True, False])
def test_a_client_that_leaves_has_a_line_too(
    text_app: App, lines: Lines, receive_says_so: bool
) -> None:
    app = text_app(FakeGenerator(Script(hang_after=2)))
    body = json.dumps({"inputs": "x"}).encode()
    receive, send = disconnecting(body, "http.response.body", receive_says_so)
    asyncio.run(app(_scope("/generate_stream"), receive, send))
    level, fields = lines.only()
    assert (level, fields["status"], fields["error_type"]) == ("INFO", 200, "cancelled")
    assert "finish_reason" not in fields and 0 < fields["generated_tokens"] <= 2


@pytest.mark.parametrize(
    ("generator", "inputs", "level", "status", "error_type"),
    [
        (FakeGenerator(), "", "INFO", 422, "validation"),
        (FakeGenerator(full=True), "x", "INFO", 429, "overloaded"),
        (FakeGenerator(ready=False), "x", "ERROR", 503, "healthcheck"),
        (FakeGenerator(Script(error=GenerationError("nan"))), "x", "ERROR", 424, "generation"),
        (FakeGenerator(Script(error=ValueError("bug"))), "x", "ERROR", 500, "internal"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_what_is_refused_or_fails_has_a_line(
    text_app: App,
    lines: Lines,
    path: str,
    generator: FakeGenerator,
    inputs: str,
    level: str,
    status: int,
    error_type: str,
) -> None:
    name = "prompt" if path.startswith("/v1") else "inputs"
    reply = post(text_app(generator), path, {name: inputs})
    assert reply.status_code == status
    logged, fields = lines.only()
    assert (logged, fields["status"], fields["error_type"]) == (level, status, error_type)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"inputs": "x", "parameters": {"top_k": "secret"}}, "parameters.top_k"),
        ("/generate", {"inputs": "x", "parameters": {"top_p": 12345.0}}, "top_p"),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 12345}}, "max_new_tokens"),
        ("/generate", {"secret": "x"}, "inputs"),
        ("/generate", {"inputs": "x", "parameters": "secret"}, "parameters"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"secret": "secret"}}, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "stop": [{"secret": 1}]}, "stop"),
        ("/tokenize", {"inputs": {"secret": 1}}, "inputs"),
    ],
)
def test_the_field_that_is_refused_is_named_and_never_its_value(
    text_app: App, lines: Lines, path: str, body: dict[str, Any], param: str
) -> None:
    assert post(text_app(), path, body).status_code == 422
    level, fields = lines.only()
    assert (level, fields["error_type"], fields["param"]) == ("INFO", "validation", param)
    assert "secret" not in lines.text and "12345" not in lines.text


def test_a_stream_that_fails_is_an_error_though_its_status_is_not(
    text_app: App, lines: Lines
) -> None:
    app = text_app(FakeGenerator(Script(error=GenerationError("a shard is gone"), error_after=2)))
    assert post(app, "/generate_stream", {"inputs": "x"}).status_code == 200
    level, fields = lines.only()
    assert (level, fields["status"], fields["error_type"]) == ("ERROR", 200, "generation")
    assert fields["generated_tokens"] == 2


def test_requests_that_never_reach_a_route(text_app: App, lines: Lines) -> None:
    app = text_app(api_key="sesame", payload_limit=100)
    key = {"authorization": "Bearer sesame"}
    post(app, "/generate", {"inputs": "x"}, headers={"authorization": "Bearer guess"})
    post(app, "/generate", {"inputs": "x" * 200}, headers=key)
    post(app, "/secret-in-the-path", {}, headers=key)
    call(app, "DELETE", "/generate", headers=key)
    told = [
        (one[FIELDS]["route"], one[FIELDS]["status"], one[FIELDS]["error_type"])
        for one in map(vars, lines.records)
    ]
    assert told == [
        ("/generate", 401, "unauthorized"),
        ("/generate", 413, "validation"),
        ("none", 404, "not_found"),
        ("/generate", 405, "method_not_allowed"),
    ]
    assert not any(secret in lines.text for secret in ("guess", "sesame", "secret-in-the-path"))


def test_probes_and_pages_leave_no_line(text_app: App, lines: Lines) -> None:
    for path in ("/health", "/", "/ping", "/metrics", "/info", "/v1/models", "/ui"):
        call(text_app(), "GET", path)
    assert call(text_app(FakeGenerator(ready=False)), "GET", "/health").status_code == 503
    assert lines.records == []


def test_a_request_id_cannot_forge_a_line(text_app: App, lines: Lines) -> None:
    harmful = b"a status=200\r\nINFO all is well"
    asyncio.run(
        text_app()(
            _scope("/generate", (b"x-request-id", harmful)),
            disconnecting(b'{"inputs": "x"}', "", True)[0],
            _ignore,
        )
    )
    _, fields = lines.only()
    assert fields["request_id"].isalnum()
    assert "all is well" not in lines.text


def test_fields_cannot_forge_a_line_nor_replace_what_a_line_has() -> None:
    record = logging.LogRecord("tessera.test", logging.INFO, __file__, 1, "done", (), None)
    setattr(record, FIELDS, {"id": "a\r\nERROR forged \x1b[31m", "count": 3, "level": "fake"})
    line = TextFormatter().format(record)
    assert line.isprintable() and line.endswith(
        r"tessera.test: done id=a\r\nERROR forged \x1b[31m count=3 level=fake"
    )
    event = json.loads(JsonFormatter().format(record))
    assert (event["count"], event["level"], event["message"]) == (3, "INFO", "done")
    assert len(JsonFormatter().format(record).splitlines()) == 1


async def _ignore(message: dict[str, Any]) -> None:
    pass


def _scope(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
    }
