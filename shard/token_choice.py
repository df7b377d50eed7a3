"""From a step's logits to its sequences' next tokens, whatever goes wrong with one of them."""

import logging
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.choice import Choice, Tokens
from tessera.shard.gumbel import draw
from tessera.shard.resilience import in_halves, one_by_one, part_of
from tessera.shard.sampler import Draw, SampleRow, choose
from tessera.shard.sequence import SequenceState
from tessera.shard.survey import Survey, survey

logger = logging.getLogger(__name__)


class ChosenTokens:
    """A token for each of some sequences: on the device until they are read."""

    def __init__(self, sequences: Sequence[SequenceState], parts: Sequence[Choice]) -> None:
        """`parts`: the sequences' tokens one after the other, in parts where memory was short."""
        self._sequences = sequences
        self._parts = parts
        ids = [part.ids_R for part in parts]
        self.ids_R = ids[0] if len(ids) == 1 else torch.cat(ids)  # on the device

    def fetch(self) -> None:
        """Copy to the host what will be read, once the device has computed it; waits for nothing.

        Whoever calls it has to wait for the device before `read`.
        """
        self._parts = [part.on_host() for part in self._parts]

    def read(self, failures: dict[int, str]) -> Tokens:
        """The tokens; sequences whose logits are not finite are added to `failures`."""
        finite = [finite for part in self._parts for finite in part.finite_R.tolist()]
        for sequence, is_finite in zip(self._sequences, finite, strict=True):
            if not is_finite:
                failures.setdefault(
                    sequence.sequence_id, "the model's output is not finite (NaN or infinity)"
                )
        return reduce(Tokens.followed_by, [part.read() for part in self._parts])


def choose_tokens(
    logits_RV: Tensor,
    masks: Mapping[int, bytes],
    sequences: Sequence[SequenceState],
    failures: dict[int, str],
    draw: Draw = draw,
    chosen_R: Tensor | None = None,
    survey: Survey = survey,
) -> ChosenTokens:
    """A token for each sequence; those for which none can be chosen are added to `failures`.

    Args:
        logits_RV: a row per sequence.
        masks: by sequence id, which tokens a guided sequence may get (`SampleRow.mask`).
        chosen_R: see `sampler.choose`.
    """
    rows = [s.unmasked for s in sequences]
    if masks:
        rows = [_masked(row, s, masks) for row, s in zip(rows, sequences, strict=True)]

    def choose_part(first: int, last: int) -> Choice:
        return choose(part_of(logits_RV, first, last), rows[first:last], draw, chosen_R, survey)

    try:
        return ChosenTokens(sequences, in_halves(choose_part, 0, len(rows)))
    except Exception:
        logger.exception("sampling failed; choosing for the sequences one by one")
    parts: list[Choice] = []
    one_each = one_by_one(lambda n: choose_part(n, n + 1), range(len(rows)))
    for sequence, part in zip(sequences, one_each, strict=True):
        if isinstance(part, str):
            failures[sequence.sequence_id] = part
            part = _none(logits_RV.device)
        parts.append(part)
    return ChosenTokens(sequences, parts)


def _none(device: torch.device) -> Choice:
    """Stands for the token of a sequence that has failed."""
    zeros_R = torch.zeros(1, dtype=torch.int64, device=device)
    return Choice(zeros_R, zeros_R.float(), zeros_R == 0, None, (0,))


def _masked(row: SampleRow, sequence: SequenceState, masks: Mapping[int, bytes]) -> SampleRow:
    return row._replace(mask=masks.get(sequence.sequence_id, b""))


def report_tokens(
    reply: shard_pb2.StepReply,
    sequences: Sequence[SequenceState],
    tokens: Tokens,
    failures: Mapping[int, str],
) -> None:
    """Tell the router about a token for each sequence, but for those that failed."""
    if failures:
        kept = [n for n, s in enumerate(sequences) if s.sequence_id not in failures]
        sequences = [sequences[n] for n in kept]
        tokens = tokens.of_rows(kept)
    columns = reply.tokens
    columns.sequence_ids.extend([s.sequence_id for s in sequences])
    columns.token_ids.extend(tokens.ids)
    columns.logprobs.extend(tokens.logprobs)
    for likeliest in tokens.tops if any(tokens.tops) else ():
        top = columns.top_tokens.add()
        for token_id, logprob in likeliest:
            top.tokens.add(token_id=token_id, logprob=logprob)
