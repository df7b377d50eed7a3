"""Answers of OpenAI's older API: whole, or as the chunks of a stream."""

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
from tessera.router.schemas import CompletionBody
from tessera.router.ticket import Generation
from tessera.router.token_streams import Collected


def completion_choice(index: int, one: Collected, body: CompletionBody) -> dict[str, Any]:
    """One entry of `choices` of a whole reply."""
    logprobs = None
    if body.logprobs is not None:
        pairs = answer_tokens(one)
        logprobs = _logprobs([t for t, _ in pairs], [top for _, top in pairs], 0)
    return {
        "index": index,
        "text": _echo(one.generation, body) + one.completion.text,
        "logprobs": logprobs,
        "finish_reason": finish_reason(one.completion),
    }


class CompletionWriter:
    """Choices of a stream: pieces of text, the last with the reason for the end."""

    def __init__(self, body: CompletionBody, generations: Sequence[Generation]) -> None:
        self._wants_logprobs = body.logprobs is not None
        self._offsets = [0] * len(generations)
        self._prefixes = [_echo(generation, body) for generation in generations]

    def choices(self, index: int, step: TokenEvent) -> list[str]:
        """See `openai_stream.ChoiceWriter`."""
        text = self._prefixes[index] + step.text
        self._prefixes[index] = ""
        logprobs = None
        if self._wants_logprobs and not is_end_token(step.token, step.completion):
            logprobs = _logprobs([step.token], [step.top_tokens], self._offsets[index])
            self._offsets[index] += len(step.token.text)
        if not text and not logprobs and step.completion is None:
            return []
        reason = step.completion and finish_reason(step.completion)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return [to_json(choice)]


def _echo(generation: Generation, body: CompletionBody) -> str:
    return generation.request.prompt_text if body.echo else ""


def _logprobs(
    tokens: Sequence[TokenInfo], tops: Sequence[Sequence[TokenInfo]], offset: int
) -> dict[str, Any]:
    """Four parallel lists; `offset` is where the first token begins, characters."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [json_logprob(token.logprob) for token in tokens],
        "top_logprobs": [{info.text: json_logprob(info.logprob) for info in top} for top in tops],
        "text_offset": offsets,
    }
