"""A cache in pairs gives the very numbers of one that is not, or is refused."""

import pytest
import torch

from tessera.shard.backends.base import CacheShape, LayerCache
from tessera.shard.backends.cpu import CpuBackend, kernel_variants
from tests.shard.backends.pool import CPU, InPairs, Pool, paired
from tests.shard.backends.test_conformance import PAIRS_WORK

pytestmark = pytest.mark.skipif(not PAIRS_WORK, reason="no instructions for pairs of bfloat16 here")

SHAPE = CacheShape(1, 2, 32, 16, torch.bfloat16)


@pytest.mark.parametrize("heads", [(2, 2, 64), (8, 2, 128), (7, 1, 80), (3, 3, 16)])
@pytest.mark.parametrize("window", [None, 1, 37, 64])
def test_attention_has_the_same_bits(heads: tuple[int, int, int], window: int | None) -> None:
    backend, lengths = CpuBackend(CPU), [1, 16, 17, 63, 129, 700]
    plain, pairs = (Pool(lengths, heads, torch.bfloat16, seed=3) for _ in range(2))
    prompts = [(s, 0, length - 1) for s, length in enumerate(lengths) if length > 1]
    for parts in (prompts, [(s, length - 1, length) for s, length in enumerate(lengths)]):
        expected = plain.step(backend, parts, window)
        got = pairs.step(InPairs(backend), parts, window)  # type: ignore[arg-type]
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_backends_own_cache_is_in_pairs_where_sizes_allow() -> None:
    backend = CpuBackend(CPU)
    (cache,) = backend.new_cache(SHAPE, 5)
    plain = LayerCache(*(torch.zeros(5, 2, 16, 32, dtype=torch.bfloat16) for _ in range(2)))
    assert cache.k_BKPH.shape == paired(plain).k_BKPH.shape
    assert cache.v_BKPH.shape == paired(plain).v_BKPH.shape
    for block_size, head_size, dtype in ((8, 32, torch.bfloat16), (16, 24, torch.bfloat16)):
        (cache,) = backend.new_cache(CacheShape(1, 2, head_size, block_size, dtype), 5)
        assert cache.k_BKPH.shape == (5, 2, block_size, head_size)
    (cache,) = backend.new_cache(CacheShape(1, 2, 32, 16, torch.float32), 5)
    assert cache.k_BKPH.shape == (5, 2, 16, 32)


def test_layouts_that_do_not_belong_together_are_refused() -> None:
    pool = Pool([20], (2, 2, 32), torch.bfloat16)
    whole = paired(pool.cache)
    q_TNH, layout = pool.sequences[0].q_CNH[:20], pool.layout([(0, 0, 20)])
    for cache in (
        LayerCache(whole.k_BKPH, pool.cache.v_BKPH),
        LayerCache(whole.k_BKPH, whole.k_BKPH),
        LayerCache(whole.v_BKPH, whole.k_BKPH),
    ):
        with pytest.raises(RuntimeError, match="keys and values"):
            CpuBackend(CPU).attend(q_TNH, cache, layout, None)
    with pytest.raises(RuntimeError, match="no pairs of"):
        CpuBackend(CPU, kernel_variants()[-1]).attend(q_TNH, whole, layout, None)
