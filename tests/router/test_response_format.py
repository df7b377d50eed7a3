"""Every way to ask for a form of the answer becomes one kind of value."""

import json
from typing import Any

import pytest

from tessera.router.errors import ValidationError
from tessera.router.grammar import GrammarKind
from tessera.router.json_body import parse_body
from tessera.router.response_format import openai_grammar
from tessera.router.schemas import ChatBody, CompletionBody

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def body(**fields: Any) -> ChatBody:
    content = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_body(json.dumps(content).encode(), ChatBody)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True, "description": None},
            }
        },
        {"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json", "value": SCHEMA}},
        {"response_format": {"type": "json_object", "value": json.dumps(SCHEMA)}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA, "regex": None, "json_object": None}},
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}},
    ],
)
def test_schemas(fields: dict[str, Any]) -> None:
    grammar = openai_grammar(body(**fields))
    assert grammar is not None and grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(grammar.source) == SCHEMA


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        (
            {"response_format": {"type": "json_object"}},
            GrammarKind.JSON_SCHEMA,
            '{"type":"object"}',
        ),
        ({"structured_outputs": {"json_object": True}}, GrammarKind.JSON_SCHEMA, None),
        ({"response_format": {"type": "regex", "value": "a+"}}, GrammarKind.REGEX, "a+"),
        ({"guided_regex": "a+"}, GrammarKind.REGEX, "a+"),
        ({"guided_choice": ["a", "ü"]}, GrammarKind.CHOICE, '["a","ü"]'),
        ({"guided_grammar": 'start: "a"'}, GrammarKind.LARK, 'start: "a"'),
        ({"structured_outputs": {"choice": ["a"]}}, GrammarKind.CHOICE, '["a"]'),
    ],
)
def test_other_forms(fields: dict[str, Any], kind: GrammarKind, source: str | None) -> None:
    grammar = openai_grammar(body(**fields))
    assert grammar is not None and grammar.kind is kind
    assert source is None or grammar.source == source


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
    ],
)
def test_any_text(fields: dict[str, Any]) -> None:
    assert openai_grammar(body(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json", "value": "{"}}, "response_format.value"),
        ({"response_format": {"type": "json", "value": "[1]"}}, "response_format.value"),
        ({"response_format": {"type": "regex", "value": {}}}, "response_format.value"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"choice": ["a", 3]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_is_no_form_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        openai_grammar(body(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"json": None, "json_object": False},
        {"jsn": {}},
        {"regex": "a", "whitespace_pattern": " "},
        {"structural_tag": "{}"},
    ],
)
def test_structured_outputs_of_unknown_kinds_are_refused(outputs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        openai_grammar(body(structured_outputs=outputs))
    assert caught.value.param == "structured_outputs" and caught.value.status == 422
    assert "json, regex, choice, grammar, json_object" in str(caught.value)


def test_plain_completions_take_the_same() -> None:
    content = b'{"prompt": "a", "response_format": {"type": "regex", "value": "b"}}'
    grammar = openai_grammar(parse_body(content, CompletionBody))
    assert grammar is not None and grammar.source == "b"
