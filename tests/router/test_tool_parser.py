import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.router.tool_parser import (
    LEAST_BEGINNING,
    CallArguments,
    CallStart,
    CallSyntax,
    Delta,
    ToolCallParser,
)
from tests.router.tool_samples import MODELS, written_call, written_calls

NAMES = ("get_weather", "get_weather_2", "stop")
Calls = list[tuple[str, str]]

kinds = st.sampled_from(sorted(MODELS))
texts = st.text(st.sampled_from('ab {}[]"\\\n<>tool_cal:/,é') | st.characters(codec="utf-8"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(texts, values, max_size=3).map(json.dumps)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=4)


def syntax(kind: str, required: bool = False) -> CallSyntax:
    return CallSyntax(MODELS[kind].format, NAMES, required)


def pieces(data: st.DataObject, text: str) -> list[str]:
    """The text cut at random places."""
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def parse(
    parser: ToolCallParser, fed: Sequence[str], *, was_cut: bool = False
) -> tuple[str, Calls]:
    deltas: list[Delta] = [delta for piece in fed for delta in parser.feed(piece)]
    deltas += parser.finish(was_cut=was_cut)
    content, found = "", []
    for delta in deltas:
        match delta:
            case CallStart(index, id_, name):
                assert index == len(found) and id_
                found.append((name, ""))
            case CallArguments(index, text):
                assert index == len(found) - 1 and text
                found[index] = (found[index][0], found[index][1] + text)
            case text:
                assert text and not found
                content += text
    return content, found


def answer(kind: str, content: str, made: Calls) -> str:
    """As a client sees it: without special tokens."""
    format = MODELS[kind].format
    each = [written_call(format, name, text) for name, text in made]
    return content + format.visible(written_calls(format, *each))


@given(st.data(), kinds, texts, calls)
def test_calls_come_out_however_the_text_is_cut(
    data: st.DataObject, kind: str, content: str, made: Calls
) -> None:
    format = MODELS[kind].format
    if not format.marker:
        content, made = "", made[:1]
    if "<tool_call>" in content or "[TOOL_CALLS]" in content:
        content = ""
    parser = ToolCallParser(syntax(kind))
    seen, found = parse(parser, pieces(data, answer(kind, content, made)))
    assert (seen, found) == (content.rstrip(), made)
    assert parser.complete


@given(st.data(), kinds, texts)
def test_text_without_calls_is_content_to_the_letter(
    data: st.DataObject, kind: str, text: str
) -> None:
    parser = ToolCallParser(syntax(kind))
    if "<tool_call>" not in text:
        assert parse(parser, pieces(data, text)) == (text, [])
    assert not parser.complete


@given(st.data(), kinds, calls)
def test_a_cut_answer_keeps_what_is_there(data: st.DataObject, kind: str, made: Calls) -> None:
    if not MODELS[kind].format.marker:
        made = made[:1]
    whole = answer(kind, "", made)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    parser = ToolCallParser(syntax(kind, required=True))
    content, found = parse(parser, pieces(data, cut))
    assert content == ""
    for (name, text), (made_name, made_text) in zip(found, made[: len(found)], strict=True):
        assert name == made_name and made_text.startswith(text)
    if parser.complete:
        assert found == made[: len(found)]


@pytest.mark.parametrize(
    ("kind", "cut", "content"),
    [
        ("tagged", "I see. <tool_call>\n{", "I see."),
        ("tagged", "I see. <tool_", "I see. <tool_"),
        ("listed", 'I see. [TOOL_CALLS] [{"name": "get_', "I see."),
        ("bare", '{"name": "get_', '{"name": "get_'),
    ],
)
def test_the_beginning_of_a_call_is_no_content(kind: str, cut: str, content: str) -> None:
    assert parse(ToolCallParser(syntax(kind)), [cut]) == (content, [])
    forced = ToolCallParser(syntax(kind, required=True))
    assert parse(forced, [cut.removeprefix("I see. ")]) == ("", [])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("content", ["", "I see.", "  a [b] {c} <d>"])
def test_no_cut_shows_the_grammar(kind: str, content: str) -> None:
    """Wherever a limit of tokens ends an answer with calls."""
    if not MODELS[kind].format.marker:
        content = ""
    whole = answer(kind, content and content + " ", [("stop", "{}")])
    for end in range(len(content), len(whole)):
        seen, found = parse(ToolCallParser(syntax(kind)), [whole[:end]], was_cut=True)
        assert [name for name, _ in found] in ([], ["stop"])
        left_over = seen.removeprefix(content).strip()
        assert seen.startswith(content) and len(left_over) < LEAST_BEGINNING
        assert len(left_over) == 0 or not found


@pytest.mark.parametrize("kind", MODELS)
def test_a_cut_answer_without_calls_is_content(kind: str) -> None:
    for text in ("a < b", "f(x) [1, 2", "Hello  ", "x {", ""):
        assert parse(ToolCallParser(syntax(kind)), list(text), was_cut=True) == (text, [])


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolCallParser(syntax("tagged"))
    assert parser.feed("Well. ") == ["Well."]
    assert parser.feed('<tool_call>\n{"name": "get_weather') == []
    (start,) = parser.feed('", "arguments": ')
    assert isinstance(start, CallStart) and start.name == "get_weather"
    assert parser.feed('{"city') == [CallArguments(0, '{"city')]
    assert parser.feed('": "}"}}') == [CallArguments(0, '": "}"}')]
    assert parser.complete


def test_a_call_in_the_middle_of_bare_text_is_text() -> None:
    text = "Like this: " + MODELS["bare"].format.head("stop") + "{}}"
    assert parse(ToolCallParser(syntax("bare")), list(text)) == (text, [])


def test_ids() -> None:
    ids = {MODELS["tagged"].format.new_id() for _ in range(50)}
    assert len(ids) == 50 and all(id_.startswith("call_") for id_ in ids)
    short = MODELS["listed"].format.new_id()  # the only length that Mistral's templates take back
    assert len(short) == 9 and short.isalnum()
