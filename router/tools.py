"""The functions a chat may call: what `tools`, `tool_choice` and their like ask for, checked."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tessera.router.errors import ToolError
from tessera.router.grammar import with_listed_only
from tessera.router.schemas import ChatBody, NamedTool, ToolSpec

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")
_MODES = (None, "auto", "required")  # of `tool_choice`: all tools may be called


@dataclass(frozen=True, slots=True)
class Tool:
    """One function."""

    name: str
    parameters: Mapping[str, Any] = field(repr=False)  # JSON schema of an object
    description: str | None = field(default=None, repr=False)
    strict: bool = False  # what of the schema cannot be enforced is refused, not ignored

    def as_openai(self) -> dict[str, Any]:
        """As chat templates expect it, in the order they print it in."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a model is told of and may call."""

    tools: tuple[Tool, ...]  # all that it is told of; at least one
    callable: tuple[Tool, ...]  # those it may call
    required: bool  # it must call
    parallel: bool = True  # it may call several times in one turn
    prompt: str | None = field(default=None, repr=False)  # the client's own words about the tools

    @property
    def names(self) -> tuple[str, ...]:
        """Of what may be called."""
        return tuple(tool.name for tool in self.callable)


def read_tools(body: ChatBody) -> ToolUse | None:
    """The tools of a request; None if it has none or wants none to be used.

    Raises:
        ToolError: a tool is not in order, or `tool_choice` names one that is not there.
    """
    tools = _read_all(body.tools or [])
    choice = body.tool_choice
    if choice == "none":
        return None
    if choice == "required" and not tools:
        raise ToolError("`tool_choice` needs `tools`.", "tool_choice")
    callable_ = tools if choice in _MODES else _named(tools, _name(choice))
    if not tools:
        return None
    return ToolUse(
        tools=tools,
        callable=callable_,
        required=choice not in (None, "auto"),
        parallel=body.parallel_tool_calls is not False,
        prompt=body.tool_prompt or None,
    )


def _read_all(specs: Sequence[ToolSpec]) -> tuple[Tool, ...]:
    if len(specs) > MAX_TOOLS:
        raise ToolError(f"`tools` may have {MAX_TOOLS} entries. Given: {len(specs)}.", "tools")
    tools = tuple(_read(spec, f"tools[{index}]") for index, spec in enumerate(specs))
    if len({tool.name for tool in tools}) < len(tools):
        raise ToolError("the names of `tools` must differ.", "tools")
    return tools


def _read(spec: ToolSpec, place: str) -> Tool:
    function = spec.function
    if spec.type != "function":
        raise ToolError(f'`{place}.type` must be "function".', "tools")
    if not _NAME.match(function.name):
        raise ToolError(
            f"`{place}.function.name` must have 1 to 64 characters, only letters, digits, _ and -.",
            "tools",
        )
    parameters = function.parameters if function.arguments is None else function.arguments
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if parameters.get("type", "object") != "object":
        raise ToolError(f'`{place}.function.parameters.type` must be "object".', "tools")
    return Tool(function.name, parameters, function.description, bool(function.strict))


def _name(choice: str | NamedTool | None) -> str:
    return choice.function.name if isinstance(choice, NamedTool) else choice or ""


def _named(tools: Sequence[Tool], name: str) -> tuple[Tool, ...]:
    found = tuple(tool for tool in tools if tool.name == name)
    if not found:
        shown = f" {name}" if _NAME.match(name) else ""
        raise ToolError(f"Tool with name{shown} not found", "tool_choice")
    return found


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema that the arguments of a call are held to: those the function lists."""
    return with_listed_only({"type": "object", **tool.parameters})


def tools_json(tools: Sequence[Tool]) -> str:
    """Descriptions of tools for a prompt, one a line."""
    functions = (tool.as_openai()["function"] for tool in tools)
    return "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
