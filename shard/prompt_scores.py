"""Logprobs of the tokens of a prompt, each given those before it."""

from itertools import chain

import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.batch import PromptSpan
from tessera.shard.models.base import Model
from tessera.shard.parallel import Group
from tessera.shard.resilience import in_halves
from tessera.shard.sampler import likeliest

Score = tuple[float, list[tuple[int, float]]]
"""Of a token: its logprob, and (id, logprob) of what was likeliest in its place."""

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

    sequence = span.sequence
    count = sequence.sampling.top_n_tokens

    def score(first: int, last: int) -> list[Score]:
        rows = slice(span.first_row + first, span.first_row + last)
        before_V = sequence.carried_logits_V

        def work() -> tuple[list[Score], Tensor | None]:
            return _scores(model, hidden_TD[rows], ids_T[rows], before_V, count)

        scores, sequence.carried_logits_V = group.together("logits", last - first, work)
        return scores

    scores: list[Score] = []
    for first in range(0, span.length, ROWS):
        last = min(first + ROWS, span.length)
        scores += chain.from_iterable(in_halves(score, first, last))
    if group.rank == 0:
        entry = reply.prompt_logprobs.add(
            sequence_id=sequence.sequence_id,
            first_position=span.first_position + span.length - len(scores),
            logprobs=[logprob for logprob, _ in scores],
        )
        for _, likely in scores if count else ():
            tokens = entry.top_tokens.add().tokens
            for token_id, logprob in likely:
                tokens.add(token_id=token_id, logprob=logprob)


def _scores(
    model: Model, hidden_RD: Tensor, ids_R: Tensor, before_V: Tensor | None, count: int
) -> tuple[list[Score], Tensor | None]:
    """The rows' scores, and the logits that score the row after them; rank 0 alone has any.

    Args:
        before_V: logits of the row before them; None at the start, whose token has no score.
        count: likeliest tokens to tell for each row.
    """
    logits_RV = model.logits(hidden_RD)
    if logits_RV is None:
        return [], None
    before = [before_V[None]] if before_V is not None else []
    logprobs_RV = torch.cat([*before, logits_RV[:-1]]).log_softmax(dim=-1)
    targets_R = ids_R[ids_R.shape[0] - logprobs_RV.shape[0] :]
    logprobs = logprobs_RV.gather(1, targets_R[:, None])[:, 0].tolist()
    return list(zip(logprobs, likeliest(logprobs_RV, count), strict=True)), logits_RV[-1]
