"""What an answer may look like when there are tools, as one grammar for one generation.

Without a duty to call, the model decides by what it writes: free text goes on as it likes, and with
the first mark of a call nothing but well-formed calls can follow.
"""

import json
from typing import Any

from tessera.router.errors import ToolError
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.tool_formats import MARKERS, ToolFormat
from tessera.router.tools import Tool, ToolUse, arguments_schema

MAX_CALLS = 32
"""Calls in one turn, so that a model that repeats itself comes to an end."""

# Spaced as templates print JSON. Free whitespace would let weak models write nothing else.
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def tool_grammar(use: ToolUse, format: ToolFormat, answer: Grammar | None = None) -> Grammar:
    """All answers that are allowed.

    Args:
        answer: what an answer that calls nothing must look like; None: any text.

    Raises:
        ToolError: `answer` cannot be told from a call.
    """
    lines = ["%llguidance {}", "ANY: /(?s:.*)/", 'LEAD: " "']
    if use.required:
        lines.append(f"start: {_first(format)} calls")
    elif answer is None:
        lines += _text_or_calls(use, format)
    else:
        _check_answer(answer, format)
        schema = json.loads(answer.source) | {"x-guidance": _SPACING}
        lines.append(f"answer: %json {_quoted(schema)}")
        lines.append(f"start: answer | {_first(format)} calls")
    lines += _calls(use, format)
    return Grammar(GrammarKind.TOOLS, "\n".join(lines) + "\n")


def _text_or_calls(use: ToolUse, format: ToolFormat) -> list[str]:
    """Text, then calls or not."""
    heads = " | ".join(_quoted(format.first_head(name)) for name in use.names)
    if not format.marker:  # calls are an answer that begins as one
        return [
            f"HEAD: {heads}",
            r"TEXT: ANY & ~(/\s*/ HEAD ANY)",
            "start: TEXT | calls",
        ]
    if format.marker in format.special_ids:  # invisible: text must not look like what follows it
        return [
            f"HEAD: {heads}",
            "TEXT: ANY & ~(ANY HEAD ANY)",
            f"start: TEXT | TEXT? {_terms(format.marker, format)} calls",
        ]
    return [
        f"until_marker[lazy]: ANY {_quoted(format.marker)}",
        "start: ANY | until_marker calls",
    ]


def _first(format: ToolFormat) -> str:
    """The marker with the space some tokenizers want before it."""
    return f"LEAD? {_terms(format.marker, format)}" if format.marker else ""


def _calls(use: ToolUse, format: ToolFormat) -> list[str]:
    several = use.parallel and format.between is not None
    more = f"({_terms(format.between or '', format)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    opening, last = _terms(format.opening, format), _terms(format.last, format)
    lines = [
        f"calls: {opening} call {more} {last}",
        "call: " + " | ".join(f"call_{index}" for index in range(len(use.callable))),
    ]
    lead = "" if format.marker else "/ ?/ "
    for index, tool in enumerate(use.callable):
        lines.append(f"HEAD_{index}: {lead}{_quoted(format.head(tool.name))}")
        lines.append(f'call_{index}: HEAD_{index} %json {_arguments(tool)} "}}"')
    return lines


def _arguments(tool: Tool) -> str:
    options = _SPACING | {"lenient": not tool.strict}
    return _quoted(arguments_schema(tool) | {"x-guidance": options})


def _check_answer(answer: Grammar, format: ToolFormat) -> None:
    if answer.kind is not GrammarKind.JSON_SCHEMA:
        raise ToolError(
            "`tools` can be combined with a `response_format` of type json_object or json_schema "
            'only; leave one of the two out, or send `tool_choice` "required" or "none".'
        )
    if not format.marker:
        raise ToolError(
            "this model writes calls as plain JSON, so `tools` cannot be combined with "
            '`response_format`; leave one of the two out, or send `tool_choice` "required" or '
            '"none".'
        )


def _terms(text: str, format: ToolFormat) -> str:
    """`text` in Lark: strings, and special tokens by their ids."""
    for marker in MARKERS:
        before, found, after = text.partition(marker)
        if found and marker in format.special_ids:
            special = f"<[{format.special_ids[marker]}]>"
            return f"{_terms(before, format)} {special} {_terms(after, format)}".strip()
    return _quoted(text) if text else ""


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
