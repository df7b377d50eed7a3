from typing import Any

import pytest

from tessera.router.errors import ToolError, ValidationError
from tessera.router.json_body import parse_body
from tessera.router.replies import to_json
from tessera.router.schemas import ChatBody
from tessera.router.tool_formats import BARE, EXPLAINED, LISTED, TAGGED, find_format
from tessera.router.tools import MAX_TOOLS, Tool, ToolUse, arguments_schema, read_tools
from tests.router.tool_samples import HERMES, LLAMA3, MISTRAL, PLAIN, STOP, TOOLS, WEATHER


def read(**fields: Any) -> ToolUse | None:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return read_tools(parse_body(to_json(body).encode(), ChatBody))


@pytest.mark.parametrize(
    ("choice", "required", "names"),
    [
        (None, False, 3),
        ("auto", False, 3),
        ("required", True, 3),
        ("stop", True, 1),
        ({"type": "function", "function": {"name": "stop"}}, True, 1),
    ],
)
def test_choices(choice: Any, required: bool, names: int) -> None:
    use = read(tools=TOOLS, tool_choice=choice)
    assert use is not None
    assert (use.required, len(use.names), len(use.tools)) == (required, names, 3)
    assert use.parallel


def test_a_function_may_have_the_name_of_a_mode() -> None:
    for name in ("none", "auto", "required"):
        use = read(tools=[*TOOLS, tool(name=name)], tool_choice={"function": {"name": name}})
        assert use is not None and (use.names, use.required) == ((name,), True)


def test_nothing_to_call() -> None:
    assert read() is None
    assert read(tools=[], tool_choice="auto") is None
    assert read(tools=None, tool_choice=None) is None
    assert read(tools=TOOLS, tool_choice="none") is None


def test_spellings() -> None:
    schema = WEATHER["function"]["parameters"]
    use = read(
        tools=[{"function": {"name": "f", "arguments": schema}}],
        parallel_tool_calls=False,
        tool_prompt="Mind.",
    )
    assert use is not None
    assert use.tools[0].parameters == schema
    assert (use.parallel, use.prompt) == (False, "Mind.")


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": TOOLS, "tool_choice": "other"}, "Tool error: Tool with name other not found"),
        ({"tools": TOOLS, "tool_choice": "<b>" * 99}, "Tool error: Tool with name not found"),
        ({"tool_choice": "required"}, "needs `tools`"),
        ({"tool_choice": {"function": {"name": "f"}}}, "Tool with name f not found"),
        ({"tools": [tool(name="a b")]}, r"`tools\[0\].function.name` must have 1 to 64"),
        ({"tools": [tool(name="a\n")]}, "must have 1 to 64"),
        ({"tools": [tool(name="x" * 65)]}, "must have 1 to 64"),
        ({"tools": [tool(), tool()]}, "must differ"),
        ({"tools": [{**tool(), "type": "search"}]}, '`tools.0..type` must be "function"'),
        ({"tools": [tool(parameters={"type": "array"})]}, 'type` must be "object"'),
        ({"tools": [STOP] * (MAX_TOOLS + 1)}, "may have 128 entries. Given: 129"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolError, match=message) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.error_type) == (422, "tool_error")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function"}]}, r"`tools\[0\].function` is required"),
        ({"tools": [tool(parameters=[])]}, r"`tools\[0\].function.parameters` must be an object"),
        ({"tools": TOOLS, "tool_choice": 3}, "`tool_choice` must be"),
        ({"tools": TOOLS, "tool_choice": {}}, "`tool_choice.function` is required"),
    ],
)
def test_shapes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(**fields)


def test_a_function_has_the_arguments_it_lists() -> None:
    listed = {"properties": {"a": {"type": "integer"}}}
    assert arguments_schema(Tool("f", listed)) == {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": False,
    }
    for open_ in ({}, {**listed, "additionalProperties": True}, {"allOf": [listed], **listed}):
        assert arguments_schema(Tool("f", open_)) == {"type": "object", **open_}


def test_formats_are_told_from_templates() -> None:
    def found(template: str | None) -> Any:
        return find_format(template, lambda _: None)

    assert found(HERMES) == TAGGED and found(MISTRAL) == LISTED and found(LLAMA3) == BARE
    assert found(PLAIN) == found(None) == EXPLAINED
    assert found("<tool_call><function=NAME></tool_call>") == EXPLAINED
    assert found("[TOOL_CALLS]name[ARGS]{}") == EXPLAINED
    assert found("{{ '[TOOL_CALLS][' }}").opening == "["


def test_special_tokens_are_known() -> None:
    format = find_format(MISTRAL, {"[TOOL_CALLS]": 7}.get)
    assert format.special_ids == {"[TOOL_CALLS]": 7}
    assert format.visible("a [TOOL_CALLS] b") == "a  b"
