import json
from typing import Any

import pytest

from tessera.router.errors import MalformedBody, RouterError, ValidationError
from tessera.router.json_body import parse_body
from tessera.router.native_bodies import GenerateBody
from tessera.router.schemas import ChatBody, CompletionBody


def chat(**fields: Any) -> ChatBody:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_body(json.dumps(body).encode(), ChatBody)


def refusal(content: bytes, shape: type[Any] = GenerateBody) -> RouterError:
    with pytest.raises(RouterError) as caught:
        parse_body(content, shape)
    return caught.value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"inputs": "a"} x',
        b'{"inputs": "a", "x": NaN}',
        b'{"inputs": "a", "x": [-Infinity]}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\xff"}',
        b'{"inputs": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"inputs": "a", "x": 1' + b"0" * 5000 + b"}",
    ],
)
def test_what_is_not_strict_json_is_malformed(content: bytes) -> None:
    error = refusal(content)
    assert (type(error), error.status) == (MalformedBody, 400)


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"1", b"null"])
def test_body_must_be_an_object(content: bytes) -> None:
    error = refusal(content)
    assert error.status == 422
    assert "must be a JSON object" in str(error)


@pytest.mark.parametrize(
    ("body", "name", "sentence"),
    [
        ({}, "inputs", "is required"),
        ({"inputs": 3}, "inputs", "must be a string"),
        ({"inputs": "a", "parameters": 3}, "parameters", "must be an object"),
        (
            {"inputs": "a", "parameters": {"temperature": "0.5"}},
            "parameters.temperature",
            "must be a number",
        ),
        (
            {"inputs": "a", "parameters": {"max_new_tokens": 1.5}},
            "parameters.max_new_tokens",
            "must be a whole number",
        ),
        (
            {"inputs": "a", "parameters": {"top_n_tokens": -1}},
            "parameters.top_n_tokens",
            "must be at least 0",
        ),
        ({"inputs": "a", "parameters": {"seed": 2**64}}, "parameters.seed", "must be at most"),
        ({"inputs": "a", "parameters": {"seed": -1}}, "parameters.seed", "must be at least 0"),
        (
            {"inputs": "a", "parameters": {"do_sample": 1}},
            "parameters.do_sample",
            "must be true or false",
        ),
        ({"inputs": "a", "parameters": {"stop": "x"}}, "parameters.stop", "must be a list"),
        (
            {"inputs": "a", "parameters": {"stop": ["x", 3]}},
            "parameters.stop[1]",
            "must be a string",
        ),
    ],
)
def test_wrong_type_names_the_field(body: dict[str, Any], name: str, sentence: str) -> None:
    error = refusal(json.dumps(body).encode())
    assert isinstance(error, ValidationError)
    assert (error.status, error.param) == (422, name)
    assert f"`{name}` {sentence}" in str(error)


def test_overflowing_number_is_refused() -> None:
    assert "finite" in str(refusal(b'{"inputs": "a", "parameters": {"temperature": 1e999}}'))


@pytest.mark.parametrize(
    ("body", "name", "sentence"),
    [
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hi"}, "messages", "must be a list"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content",
            "must be a string or must be a list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}, {"text": "a"}]}]},
            "messages[0].content[1].type",
            "is required",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "stop": {"a": 1}},
            "stop",
            "must be a string or must be a list",
        ),
    ],
)
def test_unions_tell_what_was_meant(body: dict[str, Any], name: str, sentence: str) -> None:
    error = refusal(json.dumps(body).encode(), ChatBody)
    assert f"`{name}` {sentence}" in str(error)


def test_refusal_repeats_nothing_of_the_body() -> None:
    bodies: list[dict[str, Any]] = [
        {"inputs": ["SECRET"]},
        {"inputs": "a", "parameters": {"top_k": "SECRET"}},
        {"inputs": "a", "parameters": {"grammar": ["SECRET"]}},
    ]
    for body in bodies:
        assert "SECRET" not in str(refusal(json.dumps(body).encode()))
    body = {"messages": [{"role": "user", "content": "a"}], "logit_bias": {"SECRET": "x"}}
    assert "SECRET" not in str(refusal(json.dumps(body).encode(), ChatBody))


def test_many_mistakes_make_a_short_message() -> None:
    body = {"messages": [{"content": 1}] * 4000}
    assert len(str(refusal(json.dumps(body).encode(), ChatBody))) < 200


def test_nulls_and_unknown_fields_are_absent() -> None:
    body = {
        "inputs": "a",
        "unknown": {"x": [1]},
        "parameters": {"temperature": None, "stop": None, "watermark": None, "unknown": 1},
    }
    options = parse_body(json.dumps(body).encode(), GenerateBody).options
    assert (options.temperature, options.stop, options.watermark) == (None, None, None)
    assert parse_body(b'{"inputs": "a", "parameters": null}', GenerateBody).options == (
        parse_body(b'{"inputs": "a"}', GenerateBody).options
    )


def test_stop_is_a_string_or_a_list() -> None:
    assert chat(stop="x").stop_sequences == ["x"]
    assert chat(stop=["x", "y"]).stop_sequences == ["x", "y"]
    assert chat(stop=None).stop_sequences == []


def test_stream_options_may_be_null() -> None:
    assert not chat(stream_options=None).wants_usage_chunk
    assert not chat(stream_options={"include_usage": None}).wants_usage_chunk
    assert chat(stream_options={"include_usage": True}).wants_usage_chunk


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}},
        {"type": "image_url", "image_url": "data:x"},
        {"type": "image", "url": "data:x"},
        {"type": "image", "image": "data:x"},
    ],
)
def test_pictures_come_in_several_spellings(part: dict[str, Any]) -> None:
    body = chat(messages=[{"role": "user", "content": [part]}])
    content = body.messages[0].content
    assert isinstance(content, list)
    assert content[0].image_source == "data:x"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([], []),
    ],
)
def test_prompts_of_a_completion(prompt: Any, prompts: Any) -> None:
    body = parse_body(json.dumps({"prompt": prompt}).encode(), CompletionBody)
    assert body.prompts == prompts


def test_a_large_body_is_read_quickly() -> None:
    content = b'{"inputs": "' + b"QUJD" * 4_000_000 + b'"}'
    assert len(parse_body(content, GenerateBody).inputs) == 16_000_000
