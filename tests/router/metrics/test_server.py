"""Every HTTP reply is counted once, under labels that clients cannot make up."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.router.errors import GenerationError
from tests.router.http_fakes import FakeGenerator, Script, call, disconnecting, post
from tests.router.scrape import metric

App = Callable[..., Starlette]
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}


def replies(app: Starlette, **headers: str) -> dict[tuple[str, str, str], float]:
    """How often, by method, route and status; without the question itself."""
    text = call(app, "GET", "/metrics", headers=headers).text
    found = {}
    for line in text.splitlines():
        if line.startswith("tessera_http_requests_total{"):
            labels, _, count = line.rpartition(" ")
            _, method, _, route, _, status, _ = labels.split('"')
            found[method, route, status] = float(count)
    return found


def counted(app: Starlette, name: str) -> float:
    return metric(call(app, "GET", "/metrics").text, name)


def test_replies_by_route_and_status(text_app: App) -> None:
    app = text_app()
    for _ in range(2):
        assert post(app, "/generate", {"inputs": "a"}).status_code == 200
    post(app, "/generate", {"inputs": ""})
    post(app, "/v1/chat/completions", CHAT | {"stream": True})
    call(app, "GET", "/v1/models/whatever-a-client-writes")
    call(app, "GET", "/health")
    call(app, "GET", "/generate")
    call(app, "GET", "/made/up")
    call(app, "BREW", "/made/up")
    found = replies(app)
    models = next(key for key in found if "models" in key[1])
    assert "whatever" not in models[1]
    del found[models]
    assert found == {
        ("POST", "/generate", "200"): 2,
        ("POST", "/generate", "422"): 1,
        ("POST", "/v1/chat/completions", "200"): 1,
        ("GET", "/health", "200"): 1,
        ("GET", "/generate", "405"): 1,
        ("GET", "other", "404"): 1,
        ("other", "other", "404"): 1,
    }


def test_replies_given_before_the_routing_have_their_route_too(text_app: App) -> None:
    app = text_app(api_key="secret", payload_limit=100)
    post(app, "/generate", {"inputs": "a"})
    key = {"authorization": "Bearer secret"}
    post(app, "/generate", {"inputs": "a" * 200}, headers=key)
    post(app, "/made/up", {})
    assert replies(app, **key) == {
        ("POST", "/generate", "401"): 1,
        ("POST", "/generate", "413"): 1,
        ("POST", "other", "401"): 1,
    }


def test_an_error_nobody_expected_is_counted_once(text_app: App) -> None:
    app = text_app(FakeGenerator(Script(error=RuntimeError("x"))))
    assert post(app, "/generate", {"inputs": "a"}).status_code == 500
    assert replies(app) == {("POST", "/generate", "500"): 1}
    assert counted(app, "tgi_request_failure") == 1


def test_a_client_that_leaves_before_its_reply(text_app: App) -> None:
    app = text_app(FakeGenerator(Script(hang_after=0)))
    body = b'{"inputs": "a"}'
    gone = asyncio.Event()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        gone.set()
        return {"type": "http.disconnect"}

    _, send = disconnecting(body, "never", receive_says_so=True)
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "headers": headers,
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert gone.is_set()
    assert replies(app) == {("POST", "/generate", "499"): 1}
    assert counted(app, 'tgi_request_failure{err="dropped"}') == 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions"])
def test_a_generation_is_counted_once_whatever_route_it_takes(text_app: App, path: str) -> None:
    body: dict[str, Any] = {"inputs": "a"} if path.startswith("/generate") else CHAT
    app = text_app()
    for _ in range(3):
        assert post(app, path, body).status_code == 200
    names = ("tgi_request_count", "tgi_request_success", "tgi_request_duration_count")
    assert [counted(app, name) for name in names] == [3, 3, 3]
    assert counted(app, "tgi_request_failure") == 0
    failing = text_app(FakeGenerator(Script(error=GenerationError("x"), error_after=1)))
    post(failing, path, body)
    assert counted(failing, "tgi_request_count") == counted(failing, "tgi_request_failure") == 1


def test_copies_and_prompts_count_each(text_app: App) -> None:
    app = text_app(max_best_of=3)
    post(app, "/v1/chat/completions", CHAT | {"n": 3, "temperature": 1.0})
    post(app, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3})
    assert counted(app, "tgi_request_count") == counted(app, "tgi_request_success") == 5
    assert counted(app, "tgi_request_input_length_count") == 5
