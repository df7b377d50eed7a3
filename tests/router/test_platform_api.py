"""SageMaker's and Vertex AI's routes."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.router.errors import GenerationError
from tests.router.http_fakes import FakeGenerator, Script, call, events, post

App = Callable[..., Starlette]
NATIVE = {"inputs": "Say: ", "parameters": {"return_full_text": False}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"prompt": "Hello"}


def test_invocations_tell_three_kinds_of_body_apart(vision_app: App) -> None:
    app = vision_app()
    assert post(app, "/invocations", NATIVE).json() == [{"generated_text": "Hello there"}]
    chat = post(app, "/invocations", CHAT).json()
    assert chat["choices"][0]["message"]["content"] == "Hello there"
    completion = post(app, "/invocations", COMPLETION).json()
    assert completion["choices"][0]["text"] == "Hello there"


def test_a_native_prompt_goes_before_a_chat_and_a_chat_before_a_completion(vision_app: App) -> None:
    app = vision_app()
    reply = post(app, "/invocations", NATIVE | CHAT | COMPLETION).json()
    assert reply == [{"generated_text": "Hello there"}]
    assert post(app, "/invocations", CHAT | COMPLETION).json()["object"] == "chat.completion"


@pytest.mark.parametrize("body", [NATIVE, CHAT, COMPLETION], ids=["native", "chat", "completion"])
def test_invocations_stream(vision_app: App, body: dict[str, Any]) -> None:
    generator = FakeGenerator()
    response = post(vision_app(generator), "/invocations", body | {"stream": True})
    assert len(events(response)) >= 3
    assert ("[DONE]" in response.text) == ("inputs" not in body)
    assert generator.all_closed


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "the body needs `inputs`, `messages` or `prompt`"),
        ({"inputs": None, "max_tokens": 3}, "the body needs `inputs`, `messages` or `prompt`"),
        ({"inputs": 3}, "`inputs` must be a string"),
        ({"messages": []}, "`messages` must not be empty"),
        ({"prompt": "Hello", "max_tokens": "x"}, "`max_tokens` must be a whole number"),
    ],
)
def test_invocations_refuse_what_is_none_of_them(
    vision_app: App, body: dict[str, Any], told: str
) -> None:
    response = post(vision_app(), "/invocations", body)
    assert response.status_code == 422
    assert told in response.json()["error"]


def test_vertex_answers_every_instance_in_order(vision_app: App) -> None:
    generator = FakeGenerator()
    body = {"instances": [NATIVE, CHAT, {"inputs": "Third"}], "parameters": None}
    response = post(vision_app(generator), "/vertex", body)
    assert response.json() == {"predictions": ["Hello there"] * 3}
    prompts = [request.prompt_text for request in generator.requests]
    assert (prompts[0], prompts[2]) == ("Say: ", "Third")
    assert response.headers["x-generated-tokens"] == "9"
    assert generator.all_closed


def test_vertex_takes_the_likeliest_of_several_answers(vision_app: App) -> None:
    generator = FakeGenerator(Script(texts=("a",)))
    twice = {"inputs": "Hello", "parameters": {"best_of": 2, "do_sample": True}}
    response = post(vision_app(generator), "/vertex", {"instances": [twice]})
    assert response.json() == {"predictions": ["a"]}
    assert len(generator.streams) == 2
    assert response.headers["x-generated-tokens"] == "1"


@pytest.mark.parametrize(
    ("instances", "told"),
    [
        ([], "`instances` must not be empty"),
        (None, "`instances` must be a list"),
        ([{"text": "Hello"}], "`instances[0].inputs` is required"),
        ([NATIVE, NATIVE | {"stream": True}], "`instances[1].stream` is not supported"),
        ([{"inputs": ""}], "`inputs` cannot be empty"),
    ],
)
def test_vertex_refusals(vision_app: App, instances: Any, told: str) -> None:
    generator = FakeGenerator()
    response = post(vision_app(generator), "/vertex", {"instances": instances})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert told in response.json()["error"]
    assert generator.streams == []


def test_vertex_instances_count_as_requests(vision_app: App) -> None:
    app = vision_app(FakeGenerator(), max_concurrent_requests=2)
    assert post(app, "/vertex", {"instances": [CHAT] * 3}).status_code == 429
    for _ in range(2):  # permits come back
        assert post(app, "/vertex", {"instances": [CHAT] * 2}).status_code == 200


def test_one_failing_instance_fails_them_all(vision_app: App) -> None:
    generator = FakeGenerator(Script(error=GenerationError("out of memory"), error_after=1))
    response = post(vision_app(generator), "/vertex", {"instances": [CHAT, NATIVE]})
    assert (response.status_code, response.json()["error_type"]) == (424, "generation")
    assert generator.all_closed


@pytest.mark.parametrize("path", ["/invocations", "/vertex"])
def test_the_platforms_need_the_key_too(vision_app: App, path: str) -> None:
    assert call(vision_app(api_key="Secret"), "POST", path, json=CHAT).status_code == 401
