"""Answers of a chat: whole, or as the chunks of a stream."""

from collections.abc import Sequence
from typing import Any

from tessera.router.event_stream import to_json
from tessera.router.openai_answers import (
    answer_tokens,
    finish_reason,
    is_end_token,
    json_logprob,
)
from tessera.router.request import TokenEvent, TokenInfo
from tessera.router.schemas import ChatBody
from tessera.router.token_streams import Collected


def chat_choice(index: int, one: Collected, body: ChatBody) -> dict[str, Any]:
    """One entry of `choices` of a whole reply."""
    logprobs = None
    if body.logprobs:
        content = [_logprob(token, top) for token, top in answer_tokens(one)]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": one.completion.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish_reason(one.completion),
    }


class ChatWriter:
    """Choices of a stream: the role once, then pieces of content, then the reason for the end."""

    def __init__(self, body: ChatBody) -> None:
        self._wants_logprobs = bool(body.logprobs)
        self._begun: set[int] = set()

    def choices(self, index: int, step: TokenEvent) -> list[str]:
        """See `openai_stream.ChoiceWriter`."""
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(_delta(index, '{"role":"assistant","content":""}'))
        logprobs = self._logprobs(step)
        if step.text or logprobs != "null":
            choices.append(_delta(index, f'{{"content":{to_json(step.text)}}}', logprobs))
        if step.completion is not None:
            choices.append(_delta(index, "{}", reason=f'"{finish_reason(step.completion)}"'))
        return choices

    def _logprobs(self, step: TokenEvent) -> str:
        if not self._wants_logprobs or is_end_token(step.token, step.completion):
            return "null"
        return to_json({"content": [_logprob(step.token, step.top_tokens)], "refusal": None})


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
