"""Answers of a chat: whole, or as the chunks of a stream."""

from collections.abc import Sequence
from typing import Any

from tessera.router.event_stream import text_to_json, to_json
from tessera.router.openai_answers import (
    answer_tokens,
    finish_reason,
    is_end_token,
    json_logprob,
)
from tessera.router.request import Completion, TokenEvent, TokenInfo
from tessera.router.schemas import ChatBody
from tessera.router.token_streams import Collected
from tessera.router.tool_parser import CallSyntax, ToolCallParser
from tessera.router.tool_replies import call_finish_reason, json_delta, read_answer, was_cut

_DIGITS = [str(byte) for byte in range(256)]


def chat_choice(
    index: int, one: Collected, body: ChatBody, calls: CallSyntax | None = None
) -> dict[str, Any]:
    """One entry of `choices` of a whole reply; `calls` tells how it may call functions."""
    logprobs = None
    if body.logprobs:
        content = [_logprob(token, top) for token, top in answer_tokens(one)]
        logprobs = {"content": content, "refusal": None}
    message: dict[str, Any] = {"content": one.completion.text}
    reason = finish_reason(one.completion)
    if calls is not None:
        message, reason = read_answer(one.completion, calls)
    return {
        "index": index,
        "message": {"role": "assistant", **message, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": reason,
    }


class ChatWriter:
    """Choices of a stream: the role once, then the answer's pieces, then the reason for its end."""

    def __init__(self, body: ChatBody, calls: CallSyntax | None = None) -> None:
        """`calls` tells how the answers may call functions."""
        self._wants_logprobs = bool(body.logprobs)
        self._parsers = [ToolCallParser(calls) for _ in range(body.copies)] if calls else []
        self._begun: set[int] = set()

    def choices(self, index: int, step: TokenEvent) -> list[str]:
        """See `openai_stream.ChoiceWriter`."""
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(_delta(index, '{"role":"assistant","content":""}'))
        pieces, logprobs = self._pieces(index, step), self._logprobs(step)
        if not pieces and logprobs != "null":
            pieces = ['{"content":""}']
        for piece in pieces:
            choices.append(_delta(index, piece, logprobs))
            logprobs = "null"  # of the token; the first of its pieces has them
        if step.completion is not None:
            choices.append(_delta(index, "{}", reason=f'"{self._reason(index, step.completion)}"'))
        return choices

    def _pieces(self, index: int, step: TokenEvent) -> list[str]:
        """The contents of deltas, as JSON."""
        if not self._parsers:
            return [f'{{"content":{text_to_json(step.text)}}}'] if step.text else []
        deltas = self._parsers[index].feed(step.text)
        if step.completion is not None:
            deltas += self._parsers[index].finish(was_cut=was_cut(step.completion))
        return [to_json(json_delta(delta)) for delta in deltas]

    def _reason(self, index: int, completion: Completion) -> str:
        if not self._parsers:
            return finish_reason(completion)
        return call_finish_reason(completion, self._parsers[index])

    def _logprobs(self, step: TokenEvent) -> str:
        if not self._wants_logprobs or is_end_token(step.token, step.completion):
            return "null"
        top = ",".join([f"{_entry_json(info)}}}" for info in step.top_tokens])
        content = f'{_entry_json(step.token)},"top_logprobs":[{top}]}}'
        return f'{{"content":[{content}],"refusal":null}}'


def _delta(index: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
    """A choice from JSON: written as text because a stream has one for every token."""
    return f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'


def _logprob(token: TokenInfo, top: Sequence[TokenInfo]) -> dict[str, Any]:
    return _entry(token) | {"top_logprobs": [_entry(info) for info in top]}


def _entry(info: TokenInfo) -> dict[str, Any]:
    return {
        "token": info.text,
        "logprob": json_logprob(info.logprob),
        "bytes": list(info.text.encode() if info.utf8 is None else info.utf8),
    }


def _entry_json(info: TokenInfo) -> str:
    """`_entry` as text, without its last brace."""
    logprob = float.__repr__(json_logprob(info.logprob))
    utf8 = info.text.encode() if info.utf8 is None else info.utf8
    bytes_ = ",".join([_DIGITS[byte] for byte in utf8])
    return f'{{"token":{text_to_json(info.text)},"logprob":{logprob},"bytes":[{bytes_}]'
