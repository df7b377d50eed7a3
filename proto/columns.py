"""What the columns of a step and of its reply mean, row by row."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

from tessera.proto import shard_pb2

SAMPLED_LAST = -1
"""Among `Decodes.token_ids`: the token that the shard sampled last for the sequence."""


class SampledToken(NamedTuple):
    """A sequence's next token."""

    sequence_id: int
    token_id: int
    logprob: float
    top_tokens: Sequence[shard_pb2.TokenLogprob]  # most likely first


def sampled_tokens(reply: shard_pb2.StepReply) -> Iterator[SampledToken]:
    """The tokens of a reply."""
    tokens = reply.tokens
    tops = (top.tokens for top in tokens.top_tokens) if tokens.top_tokens else repeat(())
    rows = zip(tokens.sequence_ids, tokens.token_ids, tokens.logprobs, tops, strict=False)
    return map(SampledToken._make, rows)
