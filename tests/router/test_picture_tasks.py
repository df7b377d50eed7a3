"""Captions and questions as Hugging Face's clients send them to POST /."""

import base64
import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette

from tessera.router.picture_tasks import CAPTION_QUESTION
from tests.router.http_fakes import FakeGenerator, Script, call, post

App = Callable[..., Starlette]


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, kind)
    return buffer.getvalue()


ENCODED = base64.b64encode(picture()).decode()
QUESTIONS: dict[str, dict[str, Any]] = {
    "beside `inputs`": {"inputs": ENCODED, "image": ENCODED, "question": "What?", "parameters": {}},
    "without `inputs`": {"image": ENCODED, "question": "What?"},
    "as `inputs`": {"inputs": ENCODED, "question": "What?", "parameters": {"top_k": 3}},
    "inside `inputs`": {"inputs": {"image": ENCODED, "question": "What?"}},
    "data URI": {"inputs": {"image": f"data:image/png;base64,{ENCODED}", "question": "What?"}},
}


def send(app: Starlette, content: bytes, content_type: str | None = None) -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    return call(app, "POST", "/", content=content, headers=headers)


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("JPEG", "image/jpeg; charset=binary"),
        ("PNG", "application/octet-stream"),
        ("PNG", None),
        ("JPEG", None),
        ("WEBP", None),
        ("GIF", None),
    ],
)
def test_a_bare_picture_is_captioned(vision_app: App, kind: str, content_type: str | None) -> None:
    generator = FakeGenerator(Script(texts=(" A teal", " field.")))
    reply = send(vision_app(generator), picture(kind), content_type)
    assert reply.status_code == 200, reply.text
    assert reply.json() == [{"generated_text": "A teal field."}]
    (request,) = generator.requests
    assert len(request.images) == 1 and request.prompt_text.count(CAPTION_QUESTION) == 1
    assert request.sampling.temperature == 0
    assert int(reply.headers["x-prompt-tokens"]) == len(request.prompt_ids)


@pytest.mark.parametrize("body", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_is_asked_about_its_picture(vision_app: App, body: dict[str, Any]) -> None:
    generator = FakeGenerator(Script(texts=("Teal", "."), logprobs=(-0.25, -0.25)))
    reply = post(vision_app(generator), "/", body)
    assert reply.status_code == 200, reply.text
    (answer,) = reply.json()
    assert answer == {"answer": "Teal.", "score": pytest.approx(0.60653066)}  # exp(-0.5)
    (request,) = generator.requests
    assert len(request.images) == 1 and "What?" in request.prompt_text
    assert ENCODED not in request.prompt_text


@pytest.mark.parametrize(
    "body",
    [
        {"question": "What?"},
        {"inputs": {}, "question": "What?"},
        {"inputs": {"image": ENCODED}},
        {"inputs": {"image": 5, "question": "What?"}},
        {"image": ENCODED, "question": 5},
        {"image": "@@@", "question": "What?"},
        {"image": "/etc/hostname", "question": "What?"},
    ],
)
def test_an_incomplete_question_is_refused(vision_app: App, body: dict[str, Any]) -> None:
    generator = FakeGenerator()
    reply = post(vision_app(generator), "/", body)
    assert reply.status_code == 422 and reply.json()["error_type"] == "validation"
    assert generator.requests == []


def test_a_null_question_leaves_a_prompt_a_prompt(vision_app: App) -> None:
    reply = post(vision_app(), "/", {"inputs": "Say: ", "question": None})
    assert reply.json() == [{"generated_text": "Hello there"}]


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (picture()[:60], "image/png", 422),
        (b"", "image/png", 422),
        (b"neither", None, 400),
        (picture(), "text/plain", 415),
    ],
)
def test_what_is_no_picture_is_refused(
    vision_app: App, content: bytes, content_type: str | None, status: int
) -> None:
    reply = send(vision_app(), content, content_type)
    assert reply.status_code == status and len(reply.json()["error"]) > 20


def test_a_model_that_does_not_see_says_so(text_app: App) -> None:
    generator = FakeGenerator()
    reply = send(text_app(generator), picture(), "image/png")
    assert reply.status_code == 422 and generator.requests == []
