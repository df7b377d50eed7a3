"""Caches in 8 bits, of every backend that has them and runs here."""

from typing import cast

import pytest
import torch
from torch import Tensor

from tessera.shard.backends import cuda, load_backend
from tessera.shard.backends.base import Backend, CacheShape
from tessera.shard.backends.cpu import CpuBackend, kernel_variants
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.reference import ReferenceBackend, as_kept
from tessera.shard.errors import DeviceError
from tessera.shard.models.dtype import CACHE_DTYPES, resolve_cache_dtype
from tests.shard.backends.pool import CPU, NAN, HostFaced, Pool, assert_close, stored_rows


def built_variants() -> list[str]:
    try:
        return kernel_variants()
    except OSError:
        return []


GPUS = ["xpu", *(["cuda"] if cuda.available() else [])]


@pytest.fixture(params=["reference", "fused_attention", *GPUS, *built_variants()])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "xpu":
        return cast(Backend, request.getfixturevalue("xpu_backend"))
    if request.param == "cuda":
        return cast(Backend, HostFaced(load_backend("cuda")))
    if request.param == "reference":
        return ReferenceBackend(CPU)
    if request.param == "fused_attention":
        return FusedAttentionBackend(CPU)
    return CpuBackend(CPU, request.param)


@pytest.fixture(params=built_variants())
def kernels(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(CPU, request.param)


FORMATS = list(CACHE_DTYPES.values())
DTYPES = [torch.float32, torch.bfloat16]
# Rows of 8 to 256 numbers, also such as are no multiple of a vector.
HEADS = [(2, 2, 8), (4, 2, 24), (8, 2, 40), (7, 1, 64), (8, 1, 72), (3, 3, 80), (4, 2, 128)]


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_then_decode(
    backend: Backend, heads: tuple[int, int, int], dtype: torch.dtype, kept: torch.dtype
) -> None:
    pool = Pool([1, 17, 40], heads, dtype, cache_dtype=kept)
    for parts in ([(0, 0, 1), (1, 0, 16), (2, 0, 39)], [(1, 16, 17), (2, 39, 40)]):
        for part, got in zip(parts, pool.step(backend, parts), strict=True):
            assert_close(got, pool.expected(*part))


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_and_windows(backend: Backend, dtype: torch.dtype, kept: torch.dtype) -> None:
    pool = Pool([1100, 700], (8, 2, 64), dtype, cache_dtype=kept)
    pool.fill(0, 0, 1050)
    pool.fill(1, 0, 699)
    parts = [(0, 1050, 1100), (1, 699, 700)]
    for window in (None, 300):
        for part, got in zip(parts, pool.step(backend, parts, window), strict=True):
            assert_close(got, pool.expected(*part, window))


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_read_as_what_it_stands_for(
    backend: Backend, dtype: torch.dtype, kept: torch.dtype
) -> None:
    """With one key a row's result is the value."""
    pool = Pool([1], (1, 1, 256), dtype, cache_dtype=kept)
    codes_H = torch.arange(256, dtype=torch.uint8).view(kept)
    block = pool.sequences[0].blocks[0]
    pool.cache.k_BKPH[block, 0, 0] = 0.5
    pool.cache.v_BKPH[block, 0, 0] = codes_H
    (got_H,) = backend.attend(
        pool.sequences[0].q_CNH, pool.cache, pool.layout([(0, 0, 1)]), None
    ).flatten(0, 1)
    expected_H = codes_H.to(dtype)
    finite_H = expected_H.isfinite()
    assert finite_H.sum() == {torch.float8_e4m3fn: 254, torch.float8_e5m2: 248}[kept]
    assert torch.equal(got_H[finite_H], expected_H[finite_H])
    assert not got_H[~finite_H].isfinite().any()


def rotated_by_nothing(length: int, head_size: int) -> Tensor:
    """[L, H]: cosines of 1, sines of 0."""
    return torch.cat([torch.ones(length, head_size // 2), torch.zeros(length, head_size // 2)], 1)


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_the_nearest(
    backend: Backend, dtype: torch.dtype, kept: torch.dtype
) -> None:
    """From the smallest to beyond the largest, and what is none."""
    pool = Pool([40], (2, 1, 256), dtype, cache_dtype=kept)
    layout = pool.layout([(0, 0, 40)])
    generator = torch.Generator().manual_seed(0)
    qkv_TF = torch.randn(40, 4 * 256, generator=generator)
    qkv_TF *= torch.logspace(-6, 5, 40)[:, None]
    qkv_TF[3, -7:] = torch.tensor([NAN, float("inf"), -float("inf"), 0.0, -0.0, 3e38, -3e38])
    qkv_TF = qkv_TF.to(dtype)
    q_TNH = backend.rotate_and_store(qkv_TF, rotated_by_nothing(50, 256), pool.cache, layout)
    assert torch.equal(q_TNH.flatten(1)[:3], qkv_TF[:3, :512])
    stored = stored_rows(pool.cache, layout.slots_T)
    for got, given in ((stored.k_BKPH, qkv_TF[:, 512:768]), (stored.v_BKPH, qkv_TF[:, 768:])):
        assert torch.equal(got[:, 0].view(torch.uint8), as_kept(given, kept).view(torch.uint8))
    assert torch.equal(
        stored.v_BKPH[3, 0, -7:].float().nan_to_num(nan=-1),
        torch.tensor([-1, -1, -1, 0, 0, torch.finfo(kept).max, torch.finfo(kept).min]),
    )
    got, given, numbers = stored.v_BKPH[:, 0].double(), qkv_TF[:, 768:].double(), torch.finfo(kept)
    steps = given.abs().clamp(min=numbers.tiny) * numbers.eps
    inside = given.abs() < numbers.max
    assert ((got - given).abs() <= steps / 2)[inside].all()


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_rotated_before_they_are_rounded(
    backend: Backend, dtype: torch.dtype, kept: torch.dtype
) -> None:
    pools = [Pool([9, 20], (4, 2, 24), dtype, cache_dtype=which) for which in (kept, dtype)]
    layout = pools[0].layout([(0, 4, 9), (1, 0, 20)])
    generator = torch.Generator().manual_seed(0)
    qkv_TF = torch.randn(25, 8 * 24, generator=generator).to(dtype)
    angles_Lh = torch.rand(30, 12, generator=generator) * 6
    cos_sin_LH = torch.cat([angles_Lh.cos(), angles_Lh.sin()], dim=-1)
    queries = [backend.rotate_and_store(qkv_TF, cos_sin_LH, p.cache, layout) for p in pools]
    assert torch.equal(*queries)
    few, whole = (stored_rows(pool.cache, layout.slots_T) for pool in pools)
    assert torch.equal(few.k_BKPH.float(), as_kept(whole.k_BKPH, kept).float())
    assert torch.equal(few.v_BKPH.float(), as_kept(whole.v_BKPH, kept).float())
    untouched = pools[0].cache.k_BKPH.isnan().all(-1).sum()
    assert untouched == 2 * (pools[0].cache.k_BKPH.shape[0] * 16 - 25)


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("poisoned", ["k_CKH", "v_CKH"])
def test_nan_stays_in_its_sequence(backend: Backend, poisoned: str, kept: torch.dtype) -> None:
    pool = Pool([40, 40, 40], (4, 2, 16), torch.bfloat16, cache_dtype=kept)
    getattr(pool.sequences[1], poisoned)[7:] = NAN
    got = pool.step(backend, [(0, 0, 40), (1, 0, 40), (2, 0, 40)])
    assert got[1][7:].isnan().all()
    for s in (0, 2):
        assert_close(got[s], pool.expected(s, 0, 40))


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_chunks_or_threads(
    kernels: CpuBackend, dtype: torch.dtype, kept: torch.dtype
) -> None:
    pool = Pool([1100, 700], (8, 2, 64), dtype, cache_dtype=kept)
    whole = pool.step(kernels, [(0, 0, 1100), (1, 0, 700)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            (chunk,) = pool.step(kernels, [(0, 601, 1000)])
            decode = pool.step(kernels, [(0, 1099, 1100), (1, 699, 700)])
            assert torch.equal(chunk, whole[0][601:1000])
            assert torch.equal(decode[0], whole[0][-1:])
            assert torch.equal(decode[1], whole[1][-1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kept", FORMATS)
def test_a_cache_takes_half_the_bytes(backend: Backend, kept: torch.dtype) -> None:
    shapes = [CacheShape(3, 2, 24, 4, dtype) for dtype in (kept, torch.bfloat16)]
    assert 2 * shapes[0].block_bytes == shapes[1].block_bytes
    for num_blocks in (0, 5, 9000):
        caches = backend.new_cache(shapes[0], num_blocks)
        pools = [pool for cache in caches for pool in (cache.k_BKPH, cache.v_BKPH)]
        assert all(pool.shape == (num_blocks, 2, 4, 24) for pool in pools)
        assert all(pool.dtype == kept and pool.is_contiguous() for pool in pools)
        assert sum(pool.nbytes for pool in pools) == num_blocks * shapes[0].block_bytes


def test_keys_and_values_of_two_formats_are_refused(kernels: CpuBackend) -> None:
    pool = Pool([20], (2, 1, 8), torch.float32, cache_dtype=torch.float8_e5m2)
    other = pool.cache.v_BKPH.view(torch.float8_e4m3fn)
    mixed = type(pool.cache)(pool.cache.k_BKPH, other)
    with pytest.raises(RuntimeError, match="values must be"):
        kernels.attend(pool.sequences[0].q_CNH, mixed, pool.layout([(0, 0, 20)]), None)


def test_a_backend_that_has_none_says_so(backend: Backend) -> None:
    assert resolve_cache_dtype("auto", backend) is None
    assert resolve_cache_dtype("fp8_e5m2", backend) is torch.float8_e5m2

    class Without(ReferenceBackend):
        name = "without"
        float8_cache = False

    assert resolve_cache_dtype("auto", Without(CPU)) is None
    with pytest.raises(DeviceError, match="fp8_e4m3fn is not available with BACKEND=without; le"):
        resolve_cache_dtype("fp8_e4m3fn", Without(CPU))
