"""From logits to token ids: penalties, filters, and a draw (`gumbel`).

Nothing here waits for a device before `Choice.read`: what the host knows is uploaded, what only the
device knows stays there.

Letters: R rows, G guided rows, V vocabulary, B bytes of a mask, M most likely tokens, X places in
the logits, counted row by row. All arithmetic is float32 on the device of the logits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.proto.shard_pb2 import SamplingParams
from tessera.shard.choice import Choice
from tessera.shard.gumbel import draw, key_of
from tessera.shard.survey import Survey, survey
from tessera.shard.unread_tokens import resolved
from tessera.shard.upload import upload, upload_together

Draw = Callable[[Tensor, Tensor], Tensor]
"""What `gumbel.draw` does, perhaps faster."""


class SampleRow(NamedTuple):
    """One row to sample: what was asked, what came before."""

    params: SamplingParams
    token_ids: Sequence[int]  # prompt and generated; the sampled one comes next
    num_prompt_tokens: int
    mask: bytes = b""  # bit i of byte n: token 8n + i may be sampled; empty: all may

    @property
    def position(self) -> int:
        """Of the token to be sampled, counted from the prompt's first."""
        return len(self.token_ids)

    @property
    def may_end(self) -> bool:
        """Whether enough was generated for a token that ends the answer."""
        return self.position - self.num_prompt_tokens >= self.params.min_tokens

    @property
    def generated_ids(self) -> Sequence[int]:
        """What was sampled before."""
        return self.token_ids[self.num_prompt_tokens :]


def choose(
    logits_RV: Tensor,
    rows: Sequence[SampleRow],
    draw: Draw = draw,
    chosen_R: Tensor | None = None,
    survey: Survey = survey,
) -> Choice:
    """Choose one token per row. Waits for nothing.

    Order: logit bias, repetition, frequency and presence penalty, no end before min_tokens, the
    row's mask, temperature, top_k, top_p, typical_p, min_p; then the largest score for temperature
    0, else a draw from softmax(scores).

    Args:
        logits_RV: float32; not modified.
        rows: as many as the logits have. Values are in the ranges of SamplingParams.
        chosen_R: what the placeholders among the rows' token ids stand for (`unread_tokens`).
    """
    largest_R, log_sums_R, finite_R = survey(logits_RV)
    scores_RV = _masked(_with_penalties(logits_RV, rows, chosen_R), rows)
    ids_R = largest_R if scores_RV is logits_RV else scores_RV.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        part_RV, put_back = _part(scores_RV, drawn)
        ids_R = put_back(ids_R, _draw(part_RV, [rows[index] for index in drawn], draw))
    counts = tuple(row.params.top_n_tokens for row in rows)
    logprobs_R = logits_RV.gather(1, ids_R[:, None])[:, 0] - log_sums_R
    top_RM = _likeliest(logits_RV, log_sums_R, max(counts, default=0))
    return Choice(ids_R, logprobs_R, finite_R, top_RM, counts)


def likeliest(logprobs_RV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """(id, logprob) of each row's `count` most likely tokens, the likeliest first."""
    count = min(count, logprobs_RV.shape[-1])
    if not count:
        return [[] for _ in range(logprobs_RV.shape[0])]
    values_RM, ids_RM = logprobs_RV.topk(count, dim=-1)
    return [
        list(zip(ids, values, strict=True))
        for ids, values in zip(ids_RM.tolist(), values_RM.tolist(), strict=True)
    ]


def _likeliest(logits_RV: Tensor, log_sums_R: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Ids and logprobs of each row's `count` most likely tokens, or None of none."""
    count = min(count, logits_RV.shape[-1])
    if not count:
        return None
    values_RM, ids_RM = logits_RV.topk(count, dim=-1)
    return ids_RM, values_RM - log_sums_R[:, None]


def _part(
    scores_RV: Tensor, indices: list[int]
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Some rows, and what puts their results into the places they have among all rows."""
    if len(indices) == scores_RV.shape[0]:
        return scores_RV, lambda whole, part: part
    indices_R = upload(torch.tensor(indices), scores_RV.device)
    return scores_RV[indices_R], lambda whole, part: whole.index_copy(0, indices_R, part)


def _with_penalties(
    logits_RV: Tensor, rows: Sequence[SampleRow], chosen_R: Tensor | None
) -> Tensor:
    """The logits with every row's bias, penalties and bans; the input itself without any.

    Repetition: score / penalty where positive, score * penalty where negative, over prompt and
    generated ids (Keskar et al. 2019). Frequency and presence: OpenAI's formula over generated ids.
    """
    biases: list[_Touched] = []
    repeated: list[_Touched] = []
    generated: list[_Touched] = []
    banned: list[_Touched] = []
    for index, row in enumerate(rows):
        params, repetition = row.params, _repetition_penalty(row.params)
        biases += [(index, (bias.token_id,), (bias.bias,)) for bias in params.logit_bias]
        if repetition != 1.0:
            repeated.append((index, row.token_ids, (repetition,)))
        if params.frequency_penalty or params.presence_penalty:
            amounts = (params.frequency_penalty, params.presence_penalty)
            generated.append((index, row.generated_ids, amounts))
        if params.end_token_ids and not row.may_end:
            banned.append((index, params.end_token_ids, (float("-inf"),)))
    if not biases and not repeated and not generated and not banned:
        return logits_RV
    scores_RV = logits_RV.clone()
    scores_X = scores_RV.view(-1)
    if biases:
        place_X, bias_1X = _places(scores_RV, biases, chosen_R)
        scores_X.index_add_(0, place_X, bias_1X[0])
    if repeated:
        # A place may occur several times, and is read before it is written.
        place_X, penalty_1X = _places(scores_RV, repeated, chosen_R)
        value_X, penalty_X = scores_X[place_X], penalty_1X[0]
        scores_X[place_X] = torch.where(value_X < 0, value_X * penalty_X, value_X / penalty_X)
    if generated:
        place_X, (frequency_X, presence_X) = _places(scores_RV, generated, chosen_R)
        scores_X[place_X] = scores_X[place_X] - presence_X
        scores_X.index_add_(0, place_X, -frequency_X)  # as often as a place occurs
    if banned:
        place_X, minus_infinity_1X = _places(scores_RV, banned, chosen_R)
        scores_X[place_X] = minus_infinity_1X[0]
    return scores_RV


_Touched = tuple[int, Sequence[int], tuple[float, ...]]
"""A row, token ids of it, and the A amounts that their scores are changed by."""


def _places(
    scores_RV: Tensor, touched: Sequence[_Touched], chosen_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each id's place [X] among all scores, and its amounts [A, X]."""
    lengths = [len(ids) for _, ids, _ in touched]
    ids_X = np.concatenate([np.asarray(ids, np.int64) for _, ids, _ in touched])
    starts = np.array([row * scores_RV.shape[-1] for row, _, _ in touched], np.int64)
    amounts = np.array([amounts for _, _, amounts in touched], np.float32)
    arrays = (ids_X, np.repeat(starts, lengths), np.repeat(amounts.T, lengths, axis=1))
    ids, starts_X, amounts_AX = upload_together(
        [torch.from_numpy(array) for array in arrays], scores_RV.device
    )
    return starts_X + resolved(ids, chosen_R), amounts_AX


def _masked(scores_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The scores with -inf wherever a row's mask forbids a token; the input itself without any."""
    guided = [index for index, row in enumerate(rows) if row.mask]
    if not guided:
        return scores_RV
    bits_GB = np.stack([np.frombuffer(rows[index].mask, np.uint8) for index in guided])
    allowed_GV = np.unpackbits(bits_GB, axis=1, count=scores_RV.shape[-1], bitorder="little")
    forbidden_GV = upload(torch.from_numpy(allowed_GV == 0), scores_RV.device)
    part_GV, put_back = _part(scores_RV, guided)
    return put_back(scores_RV, part_GV.masked_fill(forbidden_GV, float("-inf")))


def _draw(scores_RV: Tensor, rows: Sequence[SampleRow], draw: Draw) -> Tensor:
    temperatures = [row.params.temperature for row in rows]
    scores_RV = _filtered(scores_RV / _column(temperatures, scores_RV), rows)
    keys = [key_of(row.params.seed, row.position) for row in rows]
    return draw(scores_RV, upload(torch.tensor(keys, dtype=torch.int64), scores_RV.device))


def _filtered(scores_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    filters: list[tuple[Callable[[Tensor, list[float]], Tensor], list[float], float]] = [
        (_drop_below_top_k, [float(row.params.top_k) for row in rows], 0.0),
        (_drop_outside_top_p, [_top_p(row.params) for row in rows], 1.0),
        (_drop_untypical, [_typical_p(row.params) for row in rows], 1.0),
        (_drop_below_min_p, [row.params.min_p for row in rows], 0.0),
    ]
    for drop, values, neutral in filters:
        used = [index for index, value in enumerate(values) if value != neutral]
        if used:
            part_RV, put_back = _part(scores_RV, used)
            scores_RV = put_back(scores_RV, drop(part_RV, [values[index] for index in used]))
    return scores_RV


def _drop_below_top_k(scores_RV: Tensor, k: list[float]) -> Tensor:
    """Keep scores at or above the k-th largest; ties stay."""
    last = [min(int(value), scores_RV.shape[-1]) - 1 for value in k]
    largest = scores_RV.topk(max(last) + 1, dim=-1).values
    last_R1 = upload(torch.tensor(last), scores_RV.device)[:, None]
    return scores_RV.masked_fill(scores_RV < largest.gather(1, last_R1), float("-inf"))


def _drop_outside_top_p(scores_RV: Tensor, p: list[float]) -> Tensor:
    """Keep the smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020)."""
    sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True, stable=True)
    mass_before_RV = _mass_before(sorted_RV.softmax(dim=-1))
    return _restore(sorted_RV, order_RV, mass_before_RV >= _column(p, scores_RV))


def _drop_untypical(scores_RV: Tensor, p: list[float]) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy until their mass reaches p.

    Source: Meister et al. 2022, "Locally typical sampling".
    """
    logprobs_RV = scores_RV.log_softmax(dim=-1)
    entropy_R1 = -(logprobs_RV.exp() * logprobs_RV).nansum(dim=-1, keepdim=True)
    order_RV = (-logprobs_RV - entropy_R1).abs().sort(dim=-1, stable=True).indices
    sorted_RV = scores_RV.gather(1, order_RV)
    mass_before_RV = _mass_before(logprobs_RV.exp().gather(1, order_RV))
    return _restore(sorted_RV, order_RV, mass_before_RV >= _column(p, scores_RV))


def _drop_below_min_p(scores_RV: Tensor, p: list[float]) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest one."""
    threshold_R1 = scores_RV.amax(dim=-1, keepdim=True) + _column(p, scores_RV).log()
    return scores_RV.masked_fill(scores_RV < threshold_R1, float("-inf"))


def _mass_before(probabilities_RV: Tensor) -> Tensor:
    """Mass of the tokens in front of each one; 0 for the first, which therefore always stays."""
    return probabilities_RV.cumsum(dim=-1) - probabilities_RV


def _restore(sorted_RV: Tensor, order_RV: Tensor, dropped_RV: Tensor) -> Tensor:
    kept_RV = sorted_RV.masked_fill(dropped_RV, float("-inf"))
    return torch.empty_like(kept_RV).scatter_(1, order_RV, kept_RV)


def _column(values: list[float], like: Tensor) -> Tensor:
    return upload(torch.tensor(values, dtype=like.dtype), like.device)[:, None]


def _top_p(params: SamplingParams) -> float:
    return params.top_p if params.HasField("top_p") else 1.0


def _typical_p(params: SamplingParams) -> float:
    return params.typical_p if params.HasField("typical_p") else 1.0


def _repetition_penalty(params: SamplingParams) -> float:
    return params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
