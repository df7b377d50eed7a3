"""From a step's logits to its sequences' next tokens, whatever goes wrong with one of them."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain

from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.resilience import in_halves, one_by_one
from tessera.shard.sampler import Sampled, SampleRow, sample
from tessera.shard.sequence import SequenceState

logger = logging.getLogger(__name__)


def choose_tokens(
    logits_RV: Tensor,
    masks: Mapping[int, bytes],
    sequences: Sequence[SequenceState],
    failures: dict[int, str],
) -> list[Sampled]:
    """A token for each sequence; those for which none can be chosen are added to `failures`.

    Args:
        logits_RV: a row per sequence.
        masks: by sequence id, which tokens a guided sequence may get (`SampleRow.mask`).
    """
    logits_RV = _fail_non_finite(logits_RV, sequences, failures)
    rows = [_sample_row(s, masks.get(s.sequence_id, b"")) for s in sequences]

    def choose(first: int, last: int) -> list[Sampled]:
        return sample(logits_RV[first:last], rows[first:last])

    try:
        return list(chain.from_iterable(in_halves(choose, 0, len(rows))))
    except Exception:
        logger.exception("sampling failed; choosing for the sequences one by one")
    chosen: list[Sampled] = []
    one_each = one_by_one(lambda n: choose(n, n + 1)[0], range(len(rows)))
    for sequence, token in zip(sequences, one_each, strict=True):
        if isinstance(token, str):
            failures[sequence.sequence_id] = token
            token = Sampled(token_id=0, logprob=0.0, top_tokens=())
        chosen.append(token)
    return chosen


def _fail_non_finite(
    logits_RV: Tensor, sequences: Sequence[SequenceState], failures: dict[int, str]
) -> Tensor:
    """Record rows with NaN or infinite logits and neutralise them, so that sampling goes on."""
    # A sum is finite only if all its terms are, and forty times faster than looking at each.
    if bool(logits_RV.sum(dim=-1).isfinite().all()):
        return logits_RV
    finite_R = logits_RV.isfinite().all(dim=-1)
    for sequence, finite in zip(sequences, finite_R.tolist(), strict=True):
        if not finite:
            failures.setdefault(
                sequence.sequence_id, "the model's output is not finite (NaN or infinity)"
            )
    return logits_RV.masked_fill(~finite_R[:, None], 0.0)


def _sample_row(sequence: SequenceState, mask: bytes) -> SampleRow:
    return SampleRow(
        params=sequence.sampling,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        mask=mask,
    )


def report_token(reply: shard_pb2.StepReply, sequence_id: int, token: Sampled) -> None:
    """Tell the router about one token."""
    entry = reply.tokens.add(
        sequence_id=sequence_id, token_id=token.token_id, logprob=token.logprob
    )
    for token_id, logprob in token.top_tokens:
        entry.top_tokens.add(token_id=token_id, logprob=logprob)
