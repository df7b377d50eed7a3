"""Logprobs of the tokens of a prompt, each given those before it."""

from itertools import chain

import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.batch import PromptSpan
from tessera.shard.models.base import Model
from tessera.shard.parallel import Group
from tessera.shard.resilience import in_halves

ROWS = 256
"""Prompt positions scored at once; bounds the [rows, vocabulary] logits a long prompt needs."""


def score_prompt(
    model: Model,
    group: Group,
    hidden_TD: Tensor,
    ids_T: Tensor,
    span: PromptSpan,
    reply: shard_pb2.StepReply,
) -> None:
    """Score a chunk's tokens; a collective on all ranks, of which rank 0 replies.

    Args:
        hidden_TD: of the whole step, as `ids_T`; the chunk is the rows of `span`.
    """

    def score(first: int, last: int) -> list[float]:
        rows = slice(span.first_row + first, span.first_row + last)
        before_V = span.sequence.carried_logits_V
        logprobs, carried_V = group.together(
            "logits", last - first, lambda: _scores(model, hidden_TD[rows], ids_T[rows], before_V)
        )
        span.sequence.carried_logits_V = carried_V
        return logprobs

    logprobs: list[float] = []
    for first in range(0, span.length, ROWS):
        last = min(first + ROWS, span.length)
        logprobs += chain.from_iterable(in_halves(score, first, last))
    if group.rank == 0:
        reply.prompt_logprobs.add(
            sequence_id=span.sequence.sequence_id,
            first_position=span.first_position + span.length - len(logprobs),
            logprobs=logprobs,
        )


def _scores(
    model: Model, hidden_RD: Tensor, ids_R: Tensor, before_V: Tensor | None
) -> tuple[list[float], Tensor | None]:
    """The rows' logprobs, and the logits that score the row after them; rank 0 alone has any.

    Args:
        before_V: logits of the row before them; None at the start, whose token has no logprob.
    """
    logits_RV = model.logits(hidden_RD)
    if logits_RV is None:
        return [], None
    before = [before_V[None]] if before_V is not None else []
    scores_RV = torch.cat([*before, logits_RV[:-1]]).log_softmax(dim=-1)
    targets_R = ids_R[ids_R.shape[0] - scores_RV.shape[0] :]
    return scores_RV.gather(1, targets_R[:, None])[:, 0].tolist(), logits_RV[-1]
