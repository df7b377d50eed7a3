"""Function calls in the shape OpenAI's clients read."""

from collections.abc import Sequence
from typing import Any

from tessera.router.openai_answers import finish_reason
from tessera.router.request import Completion, FinishReason
from tessera.router.tool_parser import CallArguments, CallStart, CallSyntax, Delta, ToolCallParser


def read_answer(completion: Completion, syntax: CallSyntax) -> tuple[dict[str, Any], str]:
    """A whole answer: the fields of its message, and why it ended."""
    parser = ToolCallParser(syntax)
    deltas = parser.feed(completion.text) + parser.finish(was_cut=was_cut(completion))
    content = "".join(delta for delta in deltas if isinstance(delta, str))
    calls = [
        _call(delta, _arguments(deltas, delta.index))
        for delta in deltas
        if isinstance(delta, CallStart)
    ]
    is_none = not content and (calls or syntax.required)
    message: dict[str, Any] = {"content": None if is_none else content}
    if calls:
        message["tool_calls"] = calls
    return message, call_finish_reason(completion, parser)


def json_delta(delta: Delta) -> dict[str, Any]:
    """A piece of an answer as the `delta` of a chunk."""
    match delta:
        case CallStart(index):
            return {"tool_calls": [{"index": index, **_call(delta, "")}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case content:
            return {"content": content}


def was_cut(completion: Completion) -> bool:
    """Whether something else than the model ended an answer."""
    return completion.reason is not FinishReason.EOS


def call_finish_reason(completion: Completion, parser: ToolCallParser) -> str:
    """OpenAI's name for why an answer that may call functions ended."""
    if parser.complete and completion.reason is not FinishReason.LENGTH:
        return "tool_calls"
    return finish_reason(completion)


def _arguments(deltas: Sequence[Delta], index: int) -> str:
    pieces = (d.text for d in deltas if isinstance(d, CallArguments) and d.index == index)
    return "".join(pieces)


def _call(start: CallStart, arguments: str) -> dict[str, Any]:
    function = {"name": start.name, "arguments": arguments}
    return {"id": start.id, "type": "function", "function": function}
