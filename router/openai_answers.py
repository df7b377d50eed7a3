"""What chats and plain completions say about an answer in the same words."""

import math

from tessera.router.request import Completion, FinishReason, TokenInfo
from tessera.router.token_streams import Collected

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON does not have


def finish_reason(completion: Completion) -> str:
    """OpenAI's name for why an answer ended."""
    return "length" if completion.reason is FinishReason.LENGTH else "stop"


def is_end_token(token: TokenInfo, completion: Completion | None) -> bool:
    """Whether a token is the end-of-sequence mark, which is not part of the answer."""
    return token.special and completion is not None and completion.reason is FinishReason.EOS


def answer_tokens(one: Collected) -> list[tuple[TokenInfo, tuple[TokenInfo, ...]]]:
    """The tokens of an answer, each with the likeliest at its place; without the end mark."""
    pairs = list(zip(one.tokens, one.top_tokens, strict=True))
    if pairs and is_end_token(pairs[-1][0], one.completion):
        pairs.pop()
    return pairs


def json_logprob(value: float) -> float:
    """A log probability as OpenAI's clients can read it."""
    return value if math.isfinite(value) else LEAST_LOGPROB
