"""Random numbers that are counted."""

import math

import pytest
import torch

from tessera.shard.gumbel import draw, key_of, uniforms


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_uniforms_are_uniform_and_open(seed: int) -> None:
    keys_R = torch.tensor([key_of(seed, position) for position in range(100)])
    u = uniforms(keys_R, 1000).flatten()
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(u)))
    counts = torch.histc(u, 50, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 125  # 49 degrees of freedom, beyond 1e-7
    correlation = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(float(correlation)) < 0.02


def test_rows_draw_as_each_alone_and_forbidden_tokens_never() -> None:
    scores_RV = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    scores_RV[:, ::2] = float("-inf")
    keys_R = torch.tensor([key_of(7, position) for position in range(50)])
    together = draw(scores_RV, keys_R)
    alone = [draw(scores_RV[n : n + 1], keys_R[n : n + 1]) for n in range(50)]
    assert torch.equal(together, torch.cat(alone))
    assert (together % 2 == 1).all() and together.unique().numel() > 10


def test_the_same_numbers_as_ever() -> None:
    """Seeded answers must not change from release to release."""
    numbers = uniforms(torch.tensor([key_of(42, 7)]), 3)[0].tolist()
    assert numbers == [0.9691286605121504, 0.2173155144945308, 0.8056021828373349]
