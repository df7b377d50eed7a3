"""Whatever a body holds, it is answered or refused: no defect, no echo, no permit lost."""

import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from tessera.router.native_bodies import GenerateParameters
from tessera.router.schemas import ChatBody, CompletionBody
from tests.router.http_fakes import FakeGenerator, Script, call, post

App = Callable[..., Starlette]

MAKE = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.5, 1.0, "<image>", "![](data:,)", "<s>", "\x00", "\u2028", "user"])
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(string.ascii_letters, max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def some_of(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), values, max_size=3)


parts = some_of(["type", "text", "image_url", "url", "image"]) | st.builds(
    lambda kind, value: {"type": kind, kind: value},
    st.sampled_from(["text", "image_url", "image"]),
    values,
)
harmless_messages = st.lists(
    st.builds(
        lambda content: {"role": "user", "content": content},
        st.text(max_size=5) | st.just([{"type": "text", "text": "<image>"}]),
    ),
    min_size=1,
    max_size=1,
)
messages = harmless_messages | st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "tool", ""]) | scalars,
        values | st.lists(parts, max_size=3),
    ),
    max_size=3,
)
native_bodies = st.builds(
    lambda inputs, parameters: {"inputs": inputs, "parameters": parameters},
    st.text(max_size=10) | scalars,
    some_of(sorted(GenerateParameters.model_fields)) | scalars,
)
chat_bodies = st.builds(
    lambda messages, fields: {"messages": messages, **fields},
    messages | values,
    some_of(sorted(set(ChatBody.model_fields) - {"messages"})),
)
completion_bodies = st.builds(
    lambda prompt, fields: {"prompt": prompt, **fields},
    values | st.lists(st.integers(0, 400), max_size=4),
    some_of(sorted(set(CompletionBody.model_fields) - {"prompt"})),
)
ROUTES = {
    "/": native_bodies,
    "/generate_stream": native_bodies,
    "/tokenize": native_bodies,
    "/v1/chat/completions": chat_bodies,
    "/v1/completions": completion_bodies,
}


@pytest.mark.parametrize("path", ROUTES)
def test_any_body_is_answered_or_refused(vision_app: App, path: str) -> None:
    generator = FakeGenerator(Script(texts=("a",)))
    app = vision_app(generator, max_concurrent_requests=4)

    @MAKE
    @given(ROUTES[path])
    def check(body: Any) -> None:
        response = post(app, path, body)
        assert response.status_code in (200, 422), (body, response.text)
        if response.status_code == 422:
            assert set(response.json()) == {"error", "error_type"}
            assert len(response.content) < 2000
        assert generator.all_closed

    check()
    assert post(app, "/generate", {"inputs": "a"}).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_any_bytes_are_answered_or_refused(text_app: App, path: str) -> None:
    app = text_app(FakeGenerator(Script(texts=("a",))))
    headers = {"content-type": "application/json"}

    @MAKE
    @given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
    def check(content: bytes) -> None:
        response = call(app, "POST", path, content=content, headers=headers)
        assert response.status_code in (400, 422)

    check()
