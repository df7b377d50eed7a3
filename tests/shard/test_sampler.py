"""Sampling against transformers' processors, against softmax, and against itself in company."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from transformers.generation import logits_process as oracle

from tessera.proto.shard_pb2 import LogitBias, SamplingParams
from tessera.shard.choice import TopTokens
from tessera.shard.sampler import SampleRow, _filtered, choose

VOCABULARY = 50


class Sampled(NamedTuple):
    token_id: int
    logprob: float
    top_tokens: TopTokens


def sample(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    return list(map(Sampled, *choose(logits_RV, rows).read()))


def make_row(
    prompt: tuple[int, ...] = (1, 2),
    generated: tuple[int, ...] = (),
    **params: object,
) -> SampleRow:
    token_ids = prompt + generated
    return SampleRow(SamplingParams(**params), token_ids, len(prompt))  # type: ignore[arg-type]


def make_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_is_argmax_with_the_models_own_logprob() -> None:
    logits = make_logits(3)
    got = sample(logits, [make_row()] * 3)
    assert [token.token_id for token in got] == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor([token.logprob for token in got]), expected)


def test_input_logits_stay_as_they_were() -> None:
    logits = make_logits(2)
    before = logits.clone()
    sample(logits, [make_row(temperature=0.7, top_k=3, repetition_penalty=2.0)] * 2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 7}, oracle.TopKLogitsWarper(7)),
        ({"top_k": 1000}, oracle.TopKLogitsWarper(VOCABULARY)),
        ({"top_p": 0.6}, oracle.TopPLogitsWarper(0.6)),
        ({"top_p": 0.01}, oracle.TopPLogitsWarper(0.01)),
        ({"typical_p": 0.5}, oracle.TypicalLogitsWarper(0.5)),
        ({"min_p": 0.2}, oracle.MinPLogitsWarper(0.2)),
    ],
)
def test_filters_keep_what_transformers_keeps(
    params: dict[str, float], warper: oracle.LogitsProcessor
) -> None:
    logits = make_logits(40)
    got = _filtered(logits, [make_row(temperature=1.0, **params)] * 40)
    expected = warper(torch.zeros(40, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(got, expected)


def test_filters_touch_only_the_rows_that_ask() -> None:
    logits = make_logits(3)
    rows = [
        make_row(temperature=1.0),
        make_row(temperature=1.0, top_k=1),
        make_row(temperature=1.0),
    ]
    got = _filtered(logits, rows)
    assert torch.equal(got[0], logits[0]) and torch.equal(got[2], logits[2])
    assert int(got[1].isfinite().sum()) == 1


def test_repetition_penalty_equals_transformers() -> None:
    logits = make_logits(1)
    prompt, generated = (3, 4, 5), (5, 9, 9)
    ids = torch.tensor([[*prompt, *generated]])
    expected = oracle.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    row = make_row(prompt=prompt, generated=generated, repetition_penalty=1.7)
    assert sample(logits, [row])[0].token_id == int(expected.argmax())


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5], logits[0, 6] = 2.0, 1.0
    in_prompt = make_row(prompt=(5, 5, 5), frequency_penalty=2.0, presence_penalty=2.0)
    assert sample(logits, [in_prompt])[0].token_id == 5
    once = make_row(generated=(5,), frequency_penalty=0.6)
    assert sample(logits, [once])[0].token_id == 5  # 2.0 - 0.6 > 1.0
    twice = make_row(generated=(5, 5), frequency_penalty=0.6)
    assert sample(logits, [twice])[0].token_id == 6  # 2.0 - 1.2 < 1.0
    present = make_row(generated=(5, 5), presence_penalty=0.6)
    assert sample(logits, [present])[0].token_id == 5  # presence counts once


def test_logit_bias_moves_the_choice_but_not_the_reported_logprob() -> None:
    logits = make_logits(1)
    row = make_row(logit_bias=[LogitBias(token_id=11, bias=100.0)])
    (token,) = sample(logits, [row])
    assert token.token_id == 11
    assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 11]), abs=1e-5)


def test_top_tokens_are_the_most_likely_ones_in_order() -> None:
    logits = make_logits(2)
    rows = [make_row(top_n_tokens=3), make_row(top_n_tokens=0)]
    first, second = sample(logits, rows)
    expected = logits[0].log_softmax(-1).topk(3)
    assert [token_id for token_id, _ in first.top_tokens] == expected.indices.tolist()
    assert [p for _, p in first.top_tokens] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert second.top_tokens == ()


def draws(count: int, logits: torch.Tensor, **params: object) -> list[int]:
    rows = [make_row((0,) * n, seed=11, **params) for n in range(count)]
    return [token.token_id for token in sample(logits.expand(count, -1), rows)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax(temperature: float) -> None:
    """Pearson's chi-square over 20,000 draws; fails by chance once in a million seeds."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    count = 20_000
    counts = torch.bincount(
        torch.tensor(draws(count, logits, temperature=temperature)), minlength=6
    )
    expected = (logits[0] / temperature).softmax(-1) * count
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 35.9  # the 1 - 1e-6 quantile with 5 degrees of freedom


def test_draws_after_a_filter_follow_the_renormalised_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    counts = torch.bincount(
        torch.tensor(draws(20_000, logits, temperature=1.0, top_k=3)), minlength=6
    )
    assert counts[3:].sum() == 0
    expected = logits[0, :3].softmax(-1) * 20_000
    assert float(((counts[:3] - expected) ** 2 / expected).sum()) < 27.7  # 2 degrees of freedom


def test_a_seeded_row_draws_the_same_alone_and_in_company() -> None:
    logits = make_logits(8)
    rows = [
        make_row((0,) * p, temperature=0.5 + p / 4, seed=p * 7, top_k=p, top_p=1 - p / 20)
        for p in range(8)
    ]
    together = sample(logits, rows)
    for index in range(8):
        assert sample(logits[index : index + 1], [rows[index]]) == [together[index]]
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = sample(logits[order], [rows[index] for index in order])
    assert shuffled == [together[index] for index in order]


def test_seed_and_position_both_matter() -> None:
    logits = torch.zeros(1, VOCABULARY)
    by_position = draws(64, logits, temperature=1.0)
    by_seed = [
        sample(logits, [make_row(temperature=1.0, seed=seed)])[0].token_id for seed in range(64)
    ]
    assert len(set(by_position)) > 20 and len(set(by_seed)) > 20


def mask_of(*allowed: int) -> bytes:
    bits = sum(1 << token_id for token_id in allowed)
    return bits.to_bytes(-(-VOCABULARY // 32) * 4, "little")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.01, "top_k": 2},
        {"temperature": 5.0, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.0, "typical_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 9.0, "frequency_penalty": 2.0},
        {"logit_bias": [LogitBias(token_id=4, bias=100.0), LogitBias(token_id=7, bias=-100.0)]},
    ],
)
def test_a_forbidden_token_is_never_sampled(params: dict[str, object]) -> None:
    allowed = (7, 8, 31, 32, 49)
    logits = make_logits(30)
    seeds = range(30)
    rows = [
        SampleRow(SamplingParams(seed=seed, **params), (1, 7, 7), 1, mask_of(*allowed))  # type: ignore[arg-type]
        for seed in seeds
    ]
    got = sample(logits, rows)
    assert {token.token_id for token in got} <= set(allowed)
    expected = logits.log_softmax(-1).gather(1, torch.tensor([[t.token_id] for t in got]))[:, 0]
    torch.testing.assert_close(torch.tensor([token.logprob for token in got]), expected)


def test_a_mask_with_one_token_forces_it() -> None:
    rows = [SampleRow(SamplingParams(temperature=1.0), (1,), 1, mask_of(49))]
    assert sample(make_logits(), rows)[0].token_id == 49


def test_a_mask_concerns_its_own_row_only() -> None:
    logits = make_logits(3)
    plain = [make_row(), make_row(temperature=1.0, seed=3), make_row(temperature=2.0, seed=4)]
    alone = sample(logits, plain)
    guided = SampleRow(plain[1].params, plain[1].token_ids, 2, mask_of(alone[1].token_id ^ 1))
    got = sample(logits, [plain[0], guided, plain[2]])
    assert (got[0], got[2]) == (alone[0], alone[2])
    assert got[1].token_id == alone[1].token_id ^ 1


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 0.8, "typical_p": 0.9}]
)
def test_an_answer_does_not_end_before_its_min_tokens(params: dict[str, object]) -> None:
    ends = [3, 7]
    logits = make_logits(4)
    logits[:, ends] += 50.0
    ban = {"min_tokens": 2, "end_token_ids": ends}
    rows = [make_row(generated=(5,) * n, seed=n, **params, **ban) for n in (0, 1, 2)]
    rows.append(make_row(seed=3, **params))
    got = [token.token_id in ends for token in sample(logits, rows)]
    assert got == [False, False, True, True]


def test_a_ban_stands_above_biases_and_penalties() -> None:
    logits = make_logits()
    row = make_row(
        logit_bias=[LogitBias(token_id=3, bias=100.0)],
        repetition_penalty=0.1,
        frequency_penalty=-2.0,
        min_tokens=1,
        end_token_ids=[3],
    )
    (token,) = sample(logits, [row])
    assert token.token_id != 3
    logits[0, 3] = float("-inf")
    assert token.token_id == int(logits.argmax())
