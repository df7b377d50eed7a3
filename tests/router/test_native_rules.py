"""The native API's grammars, and the parameters it refuses."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.router.errors import ValidationError
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.native_bodies import GrammarSpec
from tessera.router.native_rules import native_grammar
from tests.router.http_fakes import FakeGenerator, post

App = Callable[..., Starlette]
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"type": "string"}},
    "additionalProperties": False,
}


def grammar(**spec: Any) -> Grammar:
    found = native_grammar(GrammarSpec.model_validate(spec))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_schema", "value": {"name": "picture", "schema": SCHEMA}},
        {"type": "json_schema", "value": {"schema": SCHEMA}},
    ],
)
def test_a_schema_in_every_spelling(spec: dict[str, Any]) -> None:
    found = grammar(**spec)
    assert found.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(found.source) == SCHEMA


def test_a_regular_expression_and_any_object() -> None:
    assert grammar(type="regex", value="[0-9]+") == Grammar(GrammarKind.REGEX, "[0-9]+")
    assert json.loads(grammar(type="json_object").source) == {"type": "object"}
    assert native_grammar(None) is None


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "regex", "value": SCHEMA},
        {"type": "regex"},
        {"type": "json"},
        {"type": "json", "value": "{"},
        {"type": "json", "value": "[1]"},
        {"type": "json_schema", "value": SCHEMA},
        {"type": "json_schema", "value": {"schema": "{}"}},
        {"type": "json_schema", "value": "{}"},
    ],
)
def test_a_value_that_does_not_fit_its_type(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="`grammar` is not valid: `value` must be "):
        grammar(**spec)


def test_a_json_grammar_has_what_it_lists_and_a_json_schema_what_it_allows() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    open_ = schema | {"additionalProperties": True}
    for spec, expected in [
        ({"type": "json", "value": schema}, schema | {"additionalProperties": False}),
        ({"type": "json", "value": open_}, open_),
        ({"type": "json_schema", "value": {"schema": schema}}, schema),
    ]:
        found = native_grammar(GrammarSpec.model_validate(spec))
        assert found is not None and json.loads(found.source) == expected


def test_the_grammar_goes_with_the_request(text_app: App) -> None:
    generator = FakeGenerator()
    parameters = {"grammar": {"type": "regex", "value": "[0-9]+"}}
    response = post(text_app(generator), "/generate", {"inputs": "a", "parameters": parameters})
    assert response.status_code == 200
    assert generator.requests[0].grammar == Grammar(GrammarKind.REGEX, "[0-9]+")


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"watermark": True}, "`watermark` is not supported"),
        ({"adapter_id": "a/b"}, "`adapter_id` is not supported: no adapters are loaded"),
        ({"grammar": {"type": "lark", "value": "x"}}, "`parameters.grammar.type` must be 'json'"),
        ({"grammar": "x"}, "`parameters.grammar` must be an object"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_what_cannot_be_done_is_refused_not_ignored(
    text_app: App, path: str, parameters: dict[str, Any], told: str
) -> None:
    response = post(text_app(), path, {"inputs": "Hello", "parameters": parameters})
    assert response.status_code == 422
    assert told in response.json()["error"]


def test_what_clients_always_send_is_taken(text_app: App) -> None:
    parameters = {"watermark": False, "adapter_id": None, "grammar": None}
    body = {"inputs": "Hello", "parameters": parameters}
    assert post(text_app(), "/generate", body).status_code == 200
