"""Grammars are walked with the library that enforces them; the parser reads what comes out."""

import json
import random
import re
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher

from tessera.router.errors import ToolError
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.guidance_compile import GrammarError, compile_grammar
from tessera.router.schemas import ChatBody
from tessera.router.tool_grammar import MAX_CALLS, tool_grammar
from tessera.router.tool_parser import CallArguments, CallStart, CallSyntax, ToolCallParser
from tessera.router.tools import ToolUse, read_tools
from tests.router.tool_samples import MODELS, TOOLS, Model, written_call, written_calls

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
SCHEMAS["stop"] = {"type": "object", "maxProperties": 0}
MOST_TOKENS = 600


def use(**fields: Any) -> ToolUse:
    body = ChatBody.model_validate({"messages": MESSAGES, "tools": TOOLS, **fields})
    found = read_tools(body)
    assert found is not None
    return found


@cache
def compiled(model: Model, grammar: Grammar) -> LLMatcher:
    return compile_grammar(model.tokens, grammar)


def allowed(matcher: LLMatcher) -> list[int]:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return [int(token_id) for token_id in np.flatnonzero(np.unpackbits(bits, bitorder="little"))]


def accepted(model: Model, grammar: Grammar, text: str) -> bool:
    """Whether the whole text is an answer; text with special tokens in it is tokenised so."""
    matcher = compiled(model, grammar).deep_copy()
    for token_id in model.ids(text):
        if token_id not in allowed(matcher):
            return False
        assert matcher.consume_token(token_id)
    return model.eos_id in allowed(matcher)


def walk(model: Model, grammar: Grammar, seed: int, beginning: str = "") -> tuple[str, bool]:
    """A random answer as clients see it, and whether it came to its end."""
    rng = random.Random(seed)
    matcher = compiled(model, grammar).deep_copy()
    said = model.ids(beginning)
    assert matcher.consume_tokens(said)
    likely = {model.eos_id, *model.ids('"}')}
    for _ in range(MOST_TOKENS):
        choices = allowed(matcher)
        hurried = [token_id for token_id in choices if token_id in likely]
        token_id = rng.choice(hurried if hurried and rng.random() < 0.6 else choices)
        if token_id == model.eos_id:
            return model.tokenizer.decode(said), True
        assert matcher.consume_token(token_id)
        said.append(token_id)
    return model.tokenizer.decode(said), False


def read(text: str, syntax: CallSyntax) -> tuple[str, list[tuple[str, str]], bool]:
    parser = ToolCallParser(syntax)
    deltas = parser.feed(text) + parser.finish()
    content = "".join(delta for delta in deltas if isinstance(delta, str))
    starts = [delta for delta in deltas if isinstance(delta, CallStart)]
    arguments = [
        "".join(d.text for d in deltas if isinstance(d, CallArguments) and d.index == start.index)
        for start in starts
    ]
    pairs = [(start.name, text) for start, text in zip(starts, arguments, strict=True)]
    return content, pairs, parser.complete


def check_calls(pairs: list[tuple[str, str]], tools: ToolUse) -> None:
    assert 0 < len(pairs) <= (MAX_CALLS if tools.parallel else 1)
    for name, arguments in pairs:
        assert name in tools.names
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "nest-1"}}},
        {"tool_choice": "get_weather"},
    ],
)
def test_forced_answers_are_calls(kind: str, fields: dict[str, Any]) -> None:
    tools, model = use(**fields), MODELS[kind]
    format = model.format
    grammar = tool_grammar(tools, format)
    ended = 0
    for seed in range(6):
        text, is_whole = walk(model, grammar, seed)
        content, pairs, complete = read(text, CallSyntax(format, tools.names, True))
        assert content == ""
        if is_whole:
            ended += 1
            assert complete
            check_calls(pairs, tools)
    assert ended > 2


@pytest.mark.parametrize("kind", MODELS)
def test_free_answers_are_text_or_calls(kind: str) -> None:
    tools, model = use(), MODELS[kind]
    format = model.format
    grammar = tool_grammar(tools, format)
    for text in ("", "Hello\nthere", '{"name": "x"}', '[{"a": 1}]', "</b> <tool> {"):
        assert accepted(model, grammar, text)
    one = written_call(format, "get_weather", '{"city": "Ulm", "days": 3}')
    assert accepted(model, grammar, written_calls(format, one))
    assert (
        not accepted(model, grammar, written_calls(format, written_call(format, "unknown")))
        or not format.marker
    )
    assert not accepted(
        model, grammar, written_calls(format, written_call(format, "stop", '{"more": 1}'))
    )
    assert not accepted(model, grammar, written_calls(format, one) + " and more")
    if format.marker:
        assert accepted(model, grammar, "I shall look. " + written_calls(format, one))
    if format.between:
        assert accepted(model, grammar, written_calls(format, one, written_call(format)))
        single = tool_grammar(use(parallel_tool_calls=False), format)
        assert not accepted(model, single, written_calls(format, one, written_call(format)))
        assert not accepted(
            model, grammar, written_calls(format, *[written_call(format)] * (MAX_CALLS + 1))
        )


@pytest.mark.parametrize("kind", MODELS)
def test_once_a_call_has_begun_it_is_well_formed(kind: str) -> None:
    tools, model = use(), MODELS[kind]
    format = model.format
    beginning = "Let me see. " + format.marker if format.marker else format.head("get_weather")
    for seed in range(6):
        text, is_whole = walk(model, tool_grammar(tools, format), seed, beginning)
        content, pairs, complete = read(text, CallSyntax(format, tools.names, False))
        assert content == ("Let me see." if format.marker else "")
        if is_whole:
            assert complete
            check_calls(pairs, tools)


@pytest.mark.parametrize("kind", ["listed-special", "tagged-special"])
def test_text_that_would_read_as_a_call_is_not_written(kind: str) -> None:
    model = MODELS[kind]
    format = model.format
    grammar = tool_grammar(use(), format)
    assert not accepted(model, grammar, "x " + format.first_head("stop"))
    assert accepted(model, grammar, "x " + format.first_head("stop")[:-1])


@pytest.mark.parametrize("kind", MODELS)
def test_calls_have_no_room_for_blanks(kind: str) -> None:
    """A model that takes blanks wherever it may writes as many as templates do, and ends."""
    model, tools = MODELS[kind], use(tool_choice="required")
    matcher = compiled(model, tool_grammar(tools, model.format)).deep_copy()
    blanks, closing = model.ids(" \n\t\r"), model.ids('"}')
    rng, said = random.Random(0), list[int]()
    while model.eos_id not in (choices := allowed(matcher)):
        for wanted in (blanks, closing, choices):
            liked = [token_id for token_id in wanted if token_id in choices]
            if liked:
                break
        said.append(rng.choice(liked))
        assert matcher.consume_token(said[-1]) and len(said) < MOST_TOKENS
    text = re.sub(r'"([^"\\]|\\.)*"', '""', model.tokenizer.decode(said)).strip()
    assert not re.search(r"\s\s|[\t\r]|[^:,\]>] |\{\s|\s\}(?!\n<)", text), text


ANSWER = Grammar(
    GrammarKind.JSON_SCHEMA,
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],'
    ' "additionalProperties": false}',
)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "bare"])
def test_a_response_format_holds_for_answers_without_calls(kind: str) -> None:
    model = MODELS[kind]
    format = model.format
    grammar = tool_grammar(use(), format, ANSWER)
    assert accepted(model, grammar, '{"a": 12}')
    assert accepted(model, grammar, written_calls(format, written_call(format)))
    assert accepted(model, grammar, " " + written_calls(format, written_call(format)))
    assert not accepted(model, grammar, "Hello")
    assert not accepted(model, grammar, '{"a": 12}' + written_calls(format, written_call(format)))
    forced = tool_grammar(use(tool_choice="required"), format, ANSWER)
    assert accepted(model, forced, written_calls(format, written_call(format))) and not accepted(
        model, forced, '{"a": 12}'
    )


def test_response_formats_that_cannot_be_told_from_calls() -> None:
    with pytest.raises(ToolError, match="response_format"):
        tool_grammar(use(), MODELS["bare"].format, ANSWER)
    with pytest.raises(ToolError, match="json_schema"):
        tool_grammar(use(), MODELS["tagged"].format, Grammar(GrammarKind.REGEX, "a+"))
    tool_grammar(use(tool_choice="required"), MODELS["bare"].format, ANSWER)


def test_only_strict_tools_refuse_what_cannot_be_enforced() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "format": "zip"}}}
    for strict in (False, True):
        function = {"name": "f", "parameters": parameters, "strict": strict}
        grammar = tool_grammar(use(tools=[{"function": function}]), MODELS["tagged"].format)
        if strict:
            with pytest.raises(GrammarError, match="format"):
                compiled(MODELS["tagged"], grammar)
        else:
            compiled(MODELS["tagged"], grammar)


def test_a_hundred_tools_compile() -> None:
    model, function = MODELS["explained"], TOOLS[0]["function"]
    tools = [{"function": {**function, "name": f"tool_{number}"}} for number in range(128)]
    grammar = tool_grammar(use(tools=tools), model.format)
    one = written_call(model.format, "tool_127", '{"city": "Ulm"}')
    assert accepted(model, grammar, written_calls(model.format, one))
