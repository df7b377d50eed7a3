import asyncio
import gzip
import json
import logging
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.router.http_fakes import FakeGenerator, Script, call, post, served

App = Callable[..., Starlette]
BODY = {"inputs": "Hello"}


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/generate/", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
    ],
)
def test_no_such_route(text_app: App, method: str, path: str, status: int, kind: str) -> None:
    response = call(text_app(), method, path)
    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert isinstance(response.json()["error"], str)


def test_wrong_method_says_which_is_right(text_app: App) -> None:
    assert call(text_app(), "GET", "/generate").headers["allow"] == "POST"


def test_malformed_and_mistyped_bodies(text_app: App) -> None:
    json_header = {"content-type": "application/json"}
    broken = call(text_app(), "POST", "/generate", content=b"{", headers=json_header)
    assert (broken.status_code, broken.json()["error_type"]) == (400, "validation")
    mistyped = post(text_app(), "/generate", {"inputs": 3})
    assert mistyped.status_code == 422
    assert "`inputs` must be a string" in mistyped.json()["error"]


def test_a_byte_order_mark_is_no_part_of_the_body(text_app: App) -> None:
    content = BOM_UTF8 + json.dumps(BODY).encode()
    headers = {"content-type": "application/json"}
    response = call(text_app(), "POST", "/generate", content=content, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        (None, 200),
        ("text/plain", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_content_types(text_app: App, content_type: str | None, status: int) -> None:
    headers = {"content-type": content_type} if content_type else {}
    content = json.dumps(BODY).encode()
    response = call(text_app(), "POST", "/generate", content=content, headers=headers)
    assert response.status_code == status


def test_declared_length_over_the_limit_is_refused_unread(text_app: App) -> None:
    app = text_app(payload_limit=100)
    read: list[bool] = []
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        read.append(True)
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "query_string": b"",
        "headers": [(b"content-length", b"101")],
    }
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"], read) == (413, [])
    assert "PAYLOAD_LIMIT" in json.loads(sent[1]["body"])["error"]


@pytest.mark.parametrize(("size", "status"), [(100, 200), (101, 413)])
def test_chunked_body_is_counted(text_app: App, size: int, status: int) -> None:
    content = json.dumps(BODY).encode().ljust(size)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 10):
            yield content[start : start + 10]

    headers = {"content-type": "application/json"}
    with served(text_app(payload_limit=100)) as address:

        async def go() -> httpx.Response:
            async with httpx.AsyncClient() as client:
                return await client.post(address + "/generate", content=chunks(), headers=headers)

        response = asyncio.run(go())
    assert response.status_code == status


def test_compressed_bodies_are_refused(text_app: App) -> None:
    content = gzip.compress(json.dumps(BODY).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = call(text_app(), "POST", "/generate", content=content, headers=headers)
    assert (response.status_code, response.json()["error_type"]) == (415, "validation")
    headers["content-encoding"] = "identity"
    plain = json.dumps(BODY).encode()
    assert call(text_app(), "POST", "/generate", content=plain, headers=headers).is_success


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer Secret", 200),
        ("Bearer secret", 401),
        ("bearer Secret", 200),
        ("BEARER  Secret", 200),
        ("bearer secret", 401),
        ("Basic Secret", 401),
        ("BearerSecret", 401),
        ("Bearer Secret2", 401),
        ("Secret", 401),
        ("Bearer Secr\u00e9t", 401),
        (None, 401),
    ],
)
def test_key(text_app: App, header: str | None, status: int) -> None:
    headers = {"authorization": header.encode()} if header else {}
    app = text_app(api_key="Secret")
    for path in ("/generate", "/tokenize"):
        response = post(app, path, BODY, headers=headers)
        assert response.status_code == status
        if status == 401:
            assert response.json()["error_type"] == "unauthorized"
            assert "Secret" not in response.text


def test_only_probes_are_open(text_app: App) -> None:
    app = text_app(api_key="Secret")
    for path in ("/health", "/ping", "/"):
        assert call(app, "GET", path).status_code == 200
    for path in ("/info", "/metrics", "/v1/models", "/nowhere", "/health/"):
        assert call(app, "GET", path).status_code == 401
    assert post(app, "/", BODY).status_code == 401
    assert call(app, "GET", "/info", headers={"host": "x/health?"}).status_code == 401


def test_browsers_may_call_without_credentials(text_app: App) -> None:
    origin = {"origin": "https://app.example"}
    response = call(text_app(), "GET", "/health", headers=origin)
    assert response.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in response.headers
    preflight = origin | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    app = text_app(api_key="Secret", cors_allow_origin=("https://app.example",))
    assert call(app, "OPTIONS", "/generate", headers=preflight).status_code == 200
    preflight["origin"] = "https://other.example"
    refused = call(app, "OPTIONS", "/generate", headers=preflight)
    assert "access-control-allow-origin" not in refused.headers


def test_refusals_can_be_read_by_browsers(text_app: App) -> None:
    headers = {"origin": "https://app.example"}
    response = post(text_app(api_key="Secret"), "/generate", BODY, headers=headers)
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "*"


def test_request_ids(text_app: App) -> None:
    app = text_app()
    given = post(app, "/generate", BODY, headers={"x-request-id": "abc-1.2:3"})
    assert given.headers["x-request-id"] == "abc-1.2:3"
    made = {post(app, "/generate", BODY).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert call(app, "GET", "/nowhere").headers["x-request-id"]


@pytest.mark.parametrize("bad", ["a b", "x" * 129, "", "http://[::1]/", 'a"b'])
def test_harmful_request_ids_are_replaced(text_app: App, bad: str) -> None:
    response = call(text_app(), "GET", "/health", headers={"x-request-id": bad})
    assert response.headers["x-request-id"] not in ("", bad)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_defect_is_logged_and_told_without_detail(
    text_app: App, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    app = text_app(FakeGenerator(Script(error=RuntimeError("secret detail"))))
    with caplog.at_level(logging.ERROR):
        headers = {"x-request-id": "req-7"}
        response = post(app, path, BODY | {"prompt": "Hello"}, headers=headers)
    assert (response.status_code, response.json()["error_type"]) == (500, "internal")
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    assert "req-7" in caplog.text


def test_health_answers_while_requests_run(text_app: App) -> None:
    app = text_app(FakeGenerator(Script(hang_after=0)))
    with served(app) as address, httpx.Client() as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(address + "/generate", json=BODY, timeout=0.2)
        assert client.get(address + "/health", timeout=1).status_code == 200


def test_the_app_serves_before_the_model_is_ready(text_app: App) -> None:
    app = text_app(FakeGenerator(ready=False))
    assert call(app, "GET", "/health").status_code == 503
    assert call(app, "GET", "/info").status_code == 200
    assert post(app, "/generate", BODY).json()["error_type"] == "healthcheck"


def test_replies_do_not_show_where_the_model_lies(
    text_app: App, checkpoint: Callable[[str], Path]
) -> None:
    app = text_app(model_id=str(checkpoint("llama")))
    assert call(app, "GET", "/info").json()["model_id"] == "llama"
    assert call(text_app(model_id="org/name"), "GET", "/info").json()["model_id"] == "org/name"
