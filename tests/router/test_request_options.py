"""How a client chooses its place in the queue and its use of the cache, in both APIs."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers

from tessera.router.fairness import ANONYMOUS, fairness_key
from tessera.router.request import Request
from tests.router.http_fakes import FakeGenerator, post

App = Callable[..., Starlette]
TOKEN = "hf_SecretSecretSecret"


def body(path: str, options: dict[str, Any]) -> dict[str, Any]:
    if path.startswith("/v1/chat"):
        return {"messages": [{"role": "user", "content": "hi"}], **options}
    if path.startswith("/v1"):
        return {"prompt": "Hello", **options}
    return {"inputs": "Hello", "parameters": options}


PATHS = ["/generate", "/generate_stream", "/", "/v1/chat/completions", "/v1/completions"]


def sent(app: App, path: str, options: dict[str, Any], **headers: str) -> Request:
    generator = FakeGenerator()
    response = post(app(generator), path, body(path, options), headers=headers)
    assert response.status_code == 200, response.text
    (request,) = generator.requests
    return request


@pytest.mark.parametrize("path", PATHS)
def test_options_arrive(vision_app: App, path: str) -> None:
    options = {"priority": -7, "cache_salt": "tenant é", "cache_prompt": False}
    request = sent(vision_app, path, options)
    assert (request.priority, request.cache_salt) == (-7, "tenant é")
    assert not request.use_prefix_cache
    for absent in ({}, dict.fromkeys(options)):
        request = sent(vision_app, path, absent)
        assert (request.priority, request.cache_salt, request.use_prefix_cache) == (0, "", True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"priority": 101}, "`priority` must be >= -100 and <= 100. Given: 101"),
        ({"priority": -101}, "`priority` must be >= -100 and <= 100. Given: -101"),
        ({"priority": 1.5}, "must be a whole number"),
        ({"cache_salt": "x" * 257}, "`cache_salt` must have at most 256 characters. Given: 257"),
        ({"cache_salt": 3}, "must be a string"),
        ({"cache_prompt": "no"}, "must be true or false"),
    ],
)
def test_options_out_of_range_are_refused(
    vision_app: App, path: str, option: dict[str, Any], message: str
) -> None:
    response = post(vision_app(), path, body(path, option))
    assert response.status_code == 422 and message in response.text


@pytest.mark.parametrize("value", [-100, 100])
def test_the_ends_of_the_range_are_in_it(vision_app: App, value: int) -> None:
    options = {"priority": value, "cache_salt": "x" * 256, "cache_prompt": True}
    assert sent(vision_app, "/generate", options).priority == value


@pytest.mark.parametrize("path", PATHS)
def test_a_server_may_let_nobody_go_first(vision_app: App, path: str) -> None:
    app = vision_app(max_priority=0)
    for value, status in ((0, 200), (-100, 200), (1, 422)):
        assert post(app, path, body(path, {"priority": value})).status_code == status
    refused = post(app, path, body(path, {"priority": 1})).text
    assert (
        "`priority` must be >= -100 and <= 0. Given: 1. The upper limit is MAX_PRIORITY." in refused
    )


@pytest.mark.parametrize("path", PATHS)
def test_requests_of_one_token_share_a_key_that_does_not_show_it(
    vision_app: App, path: str
) -> None:
    mine, again, other, nobody = (
        sent(vision_app, path, {}, **headers).fairness_key
        for headers in (
            {"authorization": f"Bearer {TOKEN}"},
            {"authorization": f"bearer  {TOKEN} "},
            {"authorization": f"Bearer {TOKEN}2"},
            {},
        )
    )
    assert mine == again != other
    assert nobody == ANONYMOUS not in (mine, other)
    assert TOKEN not in mine and len(mine) == 32


@pytest.mark.parametrize(
    "values", [[], [""], ["Bearer"], ["Bearer "], ["Basic abc"], ["Bearer a", "Bearer b"]]
)
def test_anything_else_is_anonymous(values: list[str]) -> None:
    headers = Headers(raw=[(b"authorization", value.encode()) for value in values])
    assert fairness_key(headers) == ANONYMOUS


def test_any_bytes_make_a_key() -> None:
    headers = Headers(raw=[(b"authorization", b"Bearer \xff\x80\xe9")])
    assert len(fairness_key(headers)) == 32


def test_the_token_is_neither_logged_nor_sent_back(
    vision_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with caplog.at_level(logging.DEBUG):
        for options in ({}, {"priority": 1000}):
            response = post(vision_app(), "/generate", body("/generate", options), headers=headers)
            assert TOKEN not in response.text + str(response.headers)
    assert caplog.records and TOKEN not in caplog.text
