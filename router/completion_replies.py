"""Answers of OpenAI's older API: whole, or as the chunks of a stream."""

from collections.abc import Sequence
from typing import Any

from tessera.router.event_stream import finite, to_json
from tessera.router.openai_answers import (
    answer_tokens,
    finish_reason,
    is_end_token,
    json_logprob,
)
from tessera.router.request import TokenEvent, TokenInfo
from tessera.router.schemas import CompletionBody
from tessera.router.ticket import Generation
from tessera.router.token_streams import Collected


def completion_choice(index: int, one: Collected, body: CompletionBody) -> dict[str, Any]:
    """One entry of `choices` of a whole reply."""
    echo = _Echo(one.generation, body)
    pairs, text, reason = answer_tokens(one), one.completion.text, finish_reason(one.completion)
    if body.wants_no_answer:
        pairs, text, reason = [], "", "length"
    logprobs = None
    if body.logprobs is not None:
        logprobs = echo.logprobs()
        _extend(logprobs, pairs, len(echo.text))
    return {"index": index, "text": echo.text + text, "logprobs": logprobs, "finish_reason": reason}


class CompletionWriter:
    """Choices of a stream: pieces of text, the last with the reason for the end."""

    def __init__(self, body: CompletionBody, generations: Sequence[Generation]) -> None:
        self._body = body
        self._echoes: list[_Echo | None] = [_Echo(one, body) for one in generations]
        self._offsets = [len(echo.text) for echo in self._echoes if echo]

    def choices(self, index: int, step: TokenEvent) -> list[str]:
        """See `openai_stream.ChoiceWriter`."""
        echo, self._echoes[index] = self._echoes[index], None
        logprobs = None
        is_answer = not self._body.wants_no_answer
        if self._body.logprobs is not None:
            logprobs = echo.logprobs() if echo else _no_logprobs()
            if is_answer and not is_end_token(step.token, step.completion):
                _extend(logprobs, [(step.token, step.top_tokens)], self._offsets[index])
                self._offsets[index] += len(step.token.text)
            if not logprobs["tokens"]:
                logprobs = None
        text = (echo.text if echo else "") + (step.text if is_answer else "")
        if not text and not logprobs and step.completion is None:
            return []
        reason = step.completion and (finish_reason(step.completion) if is_answer else "length")
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return [to_json(choice)]


class _Echo:
    """The prompt before its answer, where the client wants it; else nothing."""

    def __init__(self, generation: Generation, body: CompletionBody) -> None:
        self._stream = generation.stream
        self._wanted = bool(body.echo)
        self.text = generation.request.prompt_text if self._wanted else ""

    def logprobs(self) -> dict[str, Any]:
        """Of the prompt's tokens, once the first event is out; the first follows nothing."""
        logprobs = _no_logprobs()
        offset = 0
        stream = self._stream
        for token, top in zip(stream.prompt_logprobs, stream.prompt_top_tokens, strict=True):
            if not self._wanted:
                break
            logprobs["tokens"].append(token.text)
            logprobs["token_logprobs"].append(finite(token.logprob))
            logprobs["top_logprobs"].append(_top_logprobs(top) or None)
            logprobs["text_offset"].append(min(offset, len(self.text)))
            offset += self._length(token, offset)
        return logprobs

    def _length(self, token: TokenInfo, offset: int) -> int:
        """Characters of the prompt that a token stands for; none for begin-of-sequence."""
        if token.special:
            return 0
        if token.utf8 is None:
            return len(token.text)
        # A character counts with its first byte; sentencepiece puts a space before the first word.
        length = sum(byte & 0xC0 != 0x80 for byte in token.utf8)
        is_added = offset == 0 and token.utf8[:1] == b" " and self.text[:1] != " "
        return length - is_added


def _top_logprobs(top: Sequence[TokenInfo]) -> dict[str, float]:
    return {info.text: json_logprob(info.logprob) for info in top}


def _no_logprobs() -> dict[str, Any]:
    """Four parallel lists, one entry per token."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _extend(
    logprobs: dict[str, Any],
    pairs: Sequence[tuple[TokenInfo, Sequence[TokenInfo]]],
    offset: int,
) -> None:
    """Add tokens of an answer, the first of which begins at character `offset` of the text."""
    for token, top in pairs:
        logprobs["tokens"].append(token.text)
        logprobs["token_logprobs"].append(json_logprob(token.logprob))
        logprobs["top_logprobs"].append(_top_logprobs(top))
        logprobs["text_offset"].append(offset)
        offset += len(token.text)
