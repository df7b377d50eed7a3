"""From logits to token ids: penalties, filters, and randomness that is counted, not streamed.

The random number of a token is a pure function of (seed, position, token id), so a seeded request
gives the same text alone, in any batch, after a preemption and on any number of ranks.

Letters: R rows, G guided rows, V vocabulary, B bytes of a mask. All arithmetic is float32 on the
device of the logits.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.proto.shard_pb2 import SamplingParams

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class SampleRow:
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
    def generated_ids(self) -> Sequence[int]:
        """What was sampled before."""
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token of one row."""

    token_id: int
    logprob: float  # of the model itself: before bias, penalties, temperature and filters
    top_tokens: tuple[tuple[int, float], ...]  # (id, logprob), most likely first


def sample(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token per row.

    Order: logit bias, repetition, frequency and presence penalty, the row's mask, temperature,
    top_k, top_p, typical_p, min_p; then the largest score for temperature 0, else a draw from
    softmax(scores).

    Args:
        logits_RV: float32; not modified.
        rows: as many as the logits have. Values are in the ranges of SamplingParams.
    """
    scores_RV = _masked(_with_penalties(logits_RV, rows), rows)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    ids_R = scores_RV.argmax(dim=-1)
    if drawn:
        chosen_R = _draw(scores_RV[drawn], [rows[index] for index in drawn])
        ids_R[torch.tensor(drawn, device=ids_R.device)] = chosen_R
    return _report(logits_RV, ids_R, rows)


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


def uniforms(seed: int, position: int, num_ids: int, device: torch.device) -> Tensor:
    """One float64 in (0, 1) per token id: [num_ids].

    Source: the finaliser of splitmix64 (Steele, Lea, Flood 2014) over a key made of seed and
    position, one counter value per token id.
    """
    key = _mix((_mix(seed) + _GOLDEN * (position + 1)) & _MASK64)
    z = torch.arange(1, num_ids + 1, dtype=torch.int64, device=device)
    z = z * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift(z, 31)
    return (_shift(z, 12).double() + 0.5) * 2.0**-52


def _report(logits_RV: Tensor, ids_R: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    logprobs = logprobs_RV.gather(1, ids_R[:, None])[:, 0].tolist()
    tops = likeliest(logprobs_RV, max((row.params.top_n_tokens for row in rows), default=0))
    return [
        Sampled(token_id, logprob, tuple(top[: row.params.top_n_tokens]))
        for token_id, logprob, top, row in zip(ids_R.tolist(), logprobs, tops, rows, strict=True)
    ]


def _with_penalties(logits_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The logits with every row's bias and penalties; the input itself when no row has any."""
    touched = [index for index, row in enumerate(rows) if _is_penalised(row.params)]
    if not touched:
        return logits_RV
    scores_RV = logits_RV.clone()
    for index in touched:
        _penalise(scores_RV[index], rows[index])
    return scores_RV


def _masked(scores_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The scores with -inf wherever a row's mask forbids a token; the input itself without any."""
    guided = [index for index, row in enumerate(rows) if row.mask]
    if not guided:
        return scores_RV
    bits_GB = np.stack([np.frombuffer(rows[index].mask, np.uint8) for index in guided])
    allowed_GV = np.unpackbits(bits_GB, axis=1, count=scores_RV.shape[-1], bitorder="little")
    guided_G = torch.tensor(guided, device=scores_RV.device)
    forbidden_GV = torch.from_numpy(allowed_GV == 0).to(scores_RV.device)
    part_GV = scores_RV[guided_G].masked_fill(forbidden_GV, float("-inf"))
    return scores_RV.index_copy(0, guided_G, part_GV)


def _is_penalised(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.frequency_penalty
        or params.presence_penalty
        or _repetition_penalty(params) != 1.0
    )


def _penalise(scores_V: Tensor, row: SampleRow) -> None:
    """Apply one row's bias and penalties in place.

    Repetition: score / penalty where positive, score * penalty where negative, over prompt and
    generated ids (Keskar et al. 2019). Frequency and presence: OpenAI's formula over generated ids.
    """
    params = row.params
    for bias in params.logit_bias:
        scores_V[bias.token_id] += bias.bias
    repetition = _repetition_penalty(params)
    if repetition != 1.0:
        seen = _ids(set(row.token_ids), scores_V)
        values = scores_V[seen]
        scores_V[seen] = torch.where(values < 0, values * repetition, values / repetition)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(row.generated_ids)
        generated = _ids(counts.keys(), scores_V)
        times = torch.tensor(list(counts.values()), dtype=scores_V.dtype, device=scores_V.device)
        scores_V[generated] -= params.frequency_penalty * times + params.presence_penalty


def _ids(token_ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=like.device)


def _draw(scores_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Gumbel-max: argmax(score - log(-log(u))) is a draw from softmax(scores)."""
    temperatures = [row.params.temperature for row in rows]
    scores_RV = scores_RV / _column(temperatures, scores_RV)
    scores_RV = _filtered(scores_RV, rows)
    device, vocabulary = scores_RV.device, scores_RV.shape[-1]
    noise_RV = torch.stack(
        [uniforms(row.params.seed, row.position, vocabulary, device) for row in rows]
    )
    return (scores_RV.double() - (-noise_RV.log()).log()).argmax(dim=-1)


def _filtered(scores_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    filters: list[tuple[Callable[[Tensor, Tensor], Tensor], list[float], float]] = [
        (_drop_below_top_k, [float(row.params.top_k) for row in rows], 0.0),
        (_drop_outside_top_p, [_top_p(row.params) for row in rows], 1.0),
        (_drop_untypical, [_typical_p(row.params) for row in rows], 1.0),
        (_drop_below_min_p, [row.params.min_p for row in rows], 0.0),
    ]
    for drop, values, neutral in filters:
        used = [index for index, value in enumerate(values) if value != neutral]
        if used:
            part = drop(scores_RV[used], _column([values[index] for index in used], scores_RV))
            scores_RV = scores_RV.index_copy(0, torch.tensor(used, device=part.device), part)
    return scores_RV


def _drop_below_top_k(scores_RV: Tensor, k_R1: Tensor) -> Tensor:
    """Keep scores at or above the k-th largest; ties stay."""
    k_R1 = k_R1.long().clamp(max=scores_RV.shape[-1])
    largest = scores_RV.topk(int(k_R1.max()), dim=-1).values
    return scores_RV.masked_fill(scores_RV < largest.gather(1, k_R1 - 1), float("-inf"))


def _drop_outside_top_p(scores_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020)."""
    sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True, stable=True)
    mass_before_RV = _mass_before(sorted_RV.softmax(dim=-1))
    return _restore(sorted_RV, order_RV, mass_before_RV >= p_R1)


def _drop_untypical(scores_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy until their mass reaches p.

    Source: Meister et al. 2022, "Locally typical sampling".
    """
    logprobs_RV = scores_RV.log_softmax(dim=-1)
    entropy_R1 = -(logprobs_RV.exp() * logprobs_RV).nansum(dim=-1, keepdim=True)
    order_RV = (-logprobs_RV - entropy_R1).abs().sort(dim=-1, stable=True).indices
    sorted_RV = scores_RV.gather(1, order_RV)
    mass_before_RV = _mass_before(logprobs_RV.exp().gather(1, order_RV))
    return _restore(sorted_RV, order_RV, mass_before_RV >= p_R1)


def _drop_below_min_p(scores_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest one."""
    threshold_R1 = scores_RV.amax(dim=-1, keepdim=True) + p_R1.log()
    return scores_RV.masked_fill(scores_RV < threshold_R1, float("-inf"))


def _mass_before(probabilities_RV: Tensor) -> Tensor:
    """Mass of the tokens in front of each one; 0 for the first, which therefore always stays."""
    return probabilities_RV.cumsum(dim=-1) - probabilities_RV


def _restore(sorted_RV: Tensor, order_RV: Tensor, dropped_RV: Tensor) -> Tensor:
    kept_RV = sorted_RV.masked_fill(dropped_RV, float("-inf"))
    return torch.empty_like(kept_RV).scatter_(1, order_RV, kept_RV)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _top_p(params: SamplingParams) -> float:
    return params.top_p if params.HasField("top_p") else 1.0


def _typical_p(params: SamplingParams) -> float:
    return params.typical_p if params.HasField("typical_p") else 1.0


def _repetition_penalty(params: SamplingParams) -> float:
    return params.repetition_penalty if params.HasField("repetition_penalty") else 1.0


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only has as an arithmetic one."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
