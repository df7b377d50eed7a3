"""Every backend that runs here against dense float64 arithmetic.

Triton's kernels are among them in a process with TRITON_INTERPRET=1 (`test_triton.py` starts one),
IPEX's in an environment of its own (`make test-ipex`). Intel GPUs are simulated; the reference too
is tried on a device that is not the host.
"""

import os
from typing import cast

import pytest
import torch
from torch import Tensor

from tessera.shard.backends import cuda, load_backend
from tessera.shard.backends.base import Backend, CacheShape
from tessera.shard.backends.cpu import CpuBackend, kernel_variants
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.ipex_version import ipex_fits
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.gumbel import key_of, uniforms
from tests.shard.backends.pool import CPU, NAN, HostFaced, InPairs, Pool, assert_close, stored_rows
from tests.shard.backends.simulated_device import simulated_device


def built_variants() -> list[str]:
    try:
        return kernel_variants()
    except OSError:
        return []


# The layout of the best kernels' own caches; those of these tests are not in it.
PAIRS_WORK = bool(built_variants()) and CpuBackend(CPU).pairs_work
GPUS = ["simulated", "xpu", *(["cuda"] if cuda.available() else [])]
IPEX = ["ipex"] if ipex_fits("cpu") else []
INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []


IN_PAIRS = ["in pairs"] if PAIRS_WORK else []
BACKENDS = [
    *("reference", "fused_attention"),
    *(*built_variants(), *IN_PAIRS, *GPUS, *INTERPRETED, *IPEX),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "triton":
        # Only here is Triton sure to be installed.
        from tessera.shard.backends.triton_backend import TritonBackend

        return TritonBackend(CPU, units=12)
    if request.param == "reference":
        return ReferenceBackend(CPU)
    if request.param == "fused_attention":
        return FusedAttentionBackend(CPU)
    if request.param == "in pairs":
        return cast(Backend, InPairs(CpuBackend(CPU)))
    if request.param == "ipex":
        return load_backend("cpu", "ipex")
    if request.param == "simulated":
        return cast(Backend, HostFaced(ReferenceBackend(simulated_device().device)))
    if request.param == "xpu":
        return cast(Backend, request.getfixturevalue("xpu_backend"))
    if request.param == "cuda":
        return cast(Backend, HostFaced(load_backend("cuda")))
    return CpuBackend(CPU, request.param)


@pytest.fixture(params=built_variants())
def kernels(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(CPU, request.param)


@pytest.mark.parametrize("width", [1, 15, 16, 1000, 32003])
def test_survey_of_logits(backend: Backend, width: int) -> None:
    logits_RV = torch.randn(9, width, generator=torch.Generator().manual_seed(width)) * 8
    logits_RV = logits_RV.to(torch.bfloat16).float()  # so that several are the largest
    ids_R, log_sums_R, finite_R = backend.survey(logits_RV)
    assert ids_R.tolist() == [row.index(max(row)) for row in logits_RV.tolist()]
    torch.testing.assert_close(log_sums_R, logits_RV.double().logsumexp(-1).float())
    assert finite_R.all()
    for row, wrong in enumerate((NAN, float("inf"), -float("inf"))):
        logits_RV[row, width // 2] = wrong
    assert backend.survey(logits_RV)[2].tolist() == [False] * 3 + [True] * 6


def test_the_kernels_are_built_where_the_tests_run() -> None:
    if not built_variants():
        pytest.skip("CPU kernels are not built: python -m tessera.shard.backends.build")
    assert built_variants()[-1] == "portable"


# Groups of 1, 2, 3, 4, 7, 8, 16 and 20 query heads; head sizes 8 to 256, also odd multiples of 8.
HEADS = [
    (2, 2, 8),
    (4, 2, 24),
    (3, 1, 32),
    (8, 2, 40),
    (7, 1, 64),
    (8, 1, 72),
    (3, 3, 80),
    (16, 1, 96),
    (4, 2, 128),
    (20, 1, 64),
    (2, 1, 256),
]
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_then_decode(
    backend: Backend, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    pool = Pool([1, 17, 40], heads, dtype)
    for parts in ([(0, 0, 1), (1, 0, 16), (2, 0, 39)], [(1, 16, 17), (2, 39, 40)]):
        for part, got in zip(parts, pool.step(backend, parts), strict=True):
            assert_close(got, pool.expected(*part))


@pytest.mark.parametrize("window", [1, 5, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sliding_window(backend: Backend, dtype: torch.dtype, window: int) -> None:
    pool = Pool([150, 9], (4, 2, 16), dtype)
    for parts in ([(0, 0, 70), (1, 0, 8)], [(0, 70, 149)], [(0, 149, 150), (1, 8, 9)]):
        for part, got in zip(parts, pool.step(backend, parts, window), strict=True):
            assert_close(got, pool.expected(*part, window))


def test_chunks_cut_at_every_offset(backend: Backend) -> None:
    for cut in range(1, 36):
        pool = Pool([36], (2, 1, 8), torch.float32, seed=cut)
        got = [pool.step(backend, [part])[0] for part in ((0, 0, cut), (0, cut, 36))]
        assert_close(torch.cat(got), pool.expected(0, 0, 36))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_in_a_mixed_step(backend: Backend, dtype: torch.dtype) -> None:
    pool = Pool([1700, 1025, 512, 3], (4, 2, 32), dtype)
    for s, length in ((0, 1650), (1, 1024), (2, 511)):
        pool.fill(s, 0, length)
    parts = [(0, 1650, 1700), (1, 1024, 1025), (2, 511, 512), (3, 0, 3)]
    for part, got in zip(parts, pool.step(backend, parts), strict=True):
        assert_close(got, pool.expected(*part))


def test_many_sequences(backend: Backend) -> None:
    lengths = [1 + 7 * i % 90 for i in range(100)]
    pool = Pool(lengths, (4, 2, 16), torch.float32)
    for s, length in enumerate(lengths):
        pool.fill(s, 0, length)
    parts = [(s, length - 1, length) for s, length in enumerate(lengths)]
    for part, got in zip(parts, pool.step(backend, parts), strict=True):
        assert_close(got, pool.expected(*part))


def test_steps_without_tokens(backend: Backend) -> None:
    pool = Pool([20, 5], (2, 1, 8), torch.float32)
    first, nothing, second = pool.step(backend, [(0, 0, 20), (1, 0, 0), (1, 0, 5)])
    assert nothing.shape == (0, 2, 8)
    assert_close(first, pool.expected(0, 0, 20))
    assert_close(second, pool.expected(1, 0, 5))
    assert pool.step(backend, [(0, 20, 20)])[0].shape == (0, 2, 8)


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    pool = Pool([100], (2, 1, 16), torch.float32)
    pool.sequences[0].q_CNH *= 1000
    assert_close(pool.step(backend, [(0, 0, 100)])[0], pool.expected(0, 0, 100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poisoned", ["q_CNH", "k_CKH", "v_CKH"])
def test_nan_stays_in_its_sequence(backend: Backend, poisoned: str, dtype: torch.dtype) -> None:
    pool = Pool([40, 40, 40], (4, 2, 16), dtype)
    getattr(pool.sequences[1], poisoned)[7:] = NAN
    parts = [(0, 0, 40), (1, 0, 40), (2, 0, 40)]
    got = pool.step(backend, parts)
    assert got[1][7:].isnan().all()
    for s in (0, 2):
        assert_close(got[s], pool.expected(s, 0, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_bits_do_not_depend_on_batch_chunks_or_threads(
    kernels: CpuBackend, dtype: torch.dtype, window: int | None
) -> None:
    pool = Pool([1100, 700], (8, 2, 64), dtype)
    whole = pool.step(kernels, [(0, 0, 1100), (1, 0, 700)], window)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            (chunk,) = pool.step(kernels, [(0, 601, 1000)], window)
            decode = pool.step(kernels, [(0, 1099, 1100), (1, 699, 700)], window)
            assert torch.equal(chunk, whole[0][601:1000])
            assert torch.equal(decode[0], whole[0][-1:])
            assert torch.equal(decode[1], whole[1][-1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 2, 8), (3, 77, 4, 64), (2, 600, 1, 40)])
def test_dense_attention(
    backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(*shape[:2], 3, *shape[2:], generator=generator).to(dtype)
    q, k, v = fused.unbind(2)  # views: rows that are not contiguous
    scores = torch.einsum("sqnh,scnh->snqc", q.double(), k.double()) / shape[-1] ** 0.5
    expected = torch.einsum("snqc,scnh->sqnh", scores.softmax(-1), v.double())
    assert_close(backend.attend_dense(q, k, v), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_rotate_and_store(
    backend: Backend, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_size = heads
    pool = Pool([9, 20], heads, dtype)
    layout = pool.layout([(0, 4, 9), (1, 0, 20)])
    generator = torch.Generator().manual_seed(0)
    qkv_TF = torch.randn(25, (num_heads + 2 * num_kv_heads) * head_size, generator=generator)
    qkv_TF = qkv_TF.to(dtype)
    angles_Lh = torch.rand(30, head_size // 2, generator=generator) * 6
    cos_sin_LH = torch.cat([angles_Lh.cos(), angles_Lh.sin()], dim=-1)

    q_TNH = backend.rotate_and_store(qkv_TF, cos_sin_LH, pool.cache, layout)

    heads_TXH = qkv_TF.double().view(25, -1, head_size)
    left, right = heads_TXH.chunk(2, dim=-1)
    turn = torch.polar(torch.ones_like(angles_Lh), angles_Lh).to(torch.complex128)
    turned = torch.complex(left, right) * turn[layout.positions_T][:, None]
    rotated_TXH = torch.cat([turned.real, turned.imag], dim=-1)
    stored = stored_rows(pool.cache, layout.slots_T)
    assert_close(q_TNH, rotated_TXH[:, :num_heads])
    assert_close(stored.k_BKPH, rotated_TXH[:, num_heads:-num_kv_heads])
    assert torch.equal(stored.v_BKPH.double(), heads_TXH[:, -num_kv_heads:])
    untouched = pool.cache.k_BKPH.isnan().all(-1).sum()
    assert untouched == num_kv_heads * (pool.cache.k_BKPH.shape[0] * 16 - 25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 1024])
def test_add_rms_norm(backend: Backend, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    total = x + residual
    first, stream = backend.add_rms_norm(x, None, weight, 1e-5)
    assert torch.equal(stream, x)
    assert_close(first, norm(x.double()))
    second, stream = backend.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(stream, total)
    assert_close(second, norm(total.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 50, 512])
def test_silu_mul(backend: Backend, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(7, 2 * width, generator=generator) * 4).to(dtype)
    gate_up[0, :2] = torch.tensor([-300.0, 300.0])
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(backend.silu_mul(gate_up), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
def test_draws_are_those_of_the_counted_numbers(backend: Backend, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_RV = torch.randn(6, vocabulary, generator=generator)
    scores_RV[:, 1::2] = float("-inf")
    keys_R = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), key_of(5, 6)])
    ids_R = backend.draw(scores_RV, keys_R)
    expected_RV = scores_RV.double() - (-uniforms(keys_R, vocabulary).log()).log()
    assert ids_R.dtype == torch.int64 and ids_R.tolist() == expected_RV.argmax(-1).tolist()


def test_draws_from_what_is_not_finite_are_ids_and_stay_in_their_row(backend: Backend) -> None:
    scores_RV = torch.zeros(3, 3000)
    scores_RV[1] = NAN
    keys_R = torch.arange(3)
    ids_R = backend.draw(scores_RV, keys_R)
    assert 0 <= int(ids_R[1]) < 3000
    assert torch.equal(ids_R[::2], backend.draw(scores_RV[::2], keys_R[::2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_operations_keep_nan_in_its_row(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.ones(3, 64).to(dtype)
    x[1, 5] = NAN
    normed, _ = backend.add_rms_norm(x, None, torch.ones(64).to(dtype), 1e-5)
    assert normed.isnan().all(-1).tolist() == [False, True, False]
    assert backend.silu_mul(x).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(24, 16), (700, 512)])  # left as they are, packed
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(
    backend: Backend, sizes: tuple[int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sizes[0], 2 * sizes[1], generator=generator).to(dtype)
    weight = whole[:, sizes[1] :]  # what a rank of two keeps: rows that are not contiguous
    bias = torch.randn(sizes[0], generator=generator).to(dtype) if with_bias else None
    linear = backend.linear(weight, bias)
    for rows in (0, 1, 9, 64):
        x = torch.randn(rows, 2 * sizes[1], generator=generator).to(dtype)[:, ::2]
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        got = linear(x)
        assert got.shape == (rows, sizes[0])
        if rows:
            assert_close(got, expected)


def test_the_cache_has_the_agreed_shape(backend: Backend) -> None:
    shape = CacheShape(3, 2, 24, 4, torch.bfloat16)
    for num_blocks in (0, 5, 9000):
        caches = backend.new_cache(shape, num_blocks)
        assert len(caches) == 3
        pools = [pool for cache in caches for pool in (cache.k_BKPH, cache.v_BKPH)]
        assert all(pool.shape == (num_blocks, 2, 4, 24) for pool in pools)
        assert all(pool.dtype == shape.dtype and pool.is_contiguous() for pool in pools)
        assert sum(pool.nbytes for pool in pools) == num_blocks * shape.block_bytes


def test_wrong_blocks_and_slots_are_refused(kernels: CpuBackend) -> None:
    pool = Pool([20], (2, 1, 8), torch.float32)
    layout = pool.layout([(0, 0, 20)])
    layout.block_tables_SM[0, 1] = 1000
    with pytest.raises(IndexError, match="block ids"):
        kernels.attend(pool.sequences[0].q_CNH, pool.cache, layout, None)
    layout.slots_T[3] = -1
    with pytest.raises(IndexError, match="slots"):
        kernels.rotate_and_store(torch.zeros(20, 32), torch.zeros(20, 8), pool.cache, layout)


def test_shapes_that_contradict_are_refused(kernels: CpuBackend) -> None:
    pool = Pool([20], (2, 1, 8), torch.float32)
    layout = pool.layout([(0, 0, 20)])
    with pytest.raises(RuntimeError, match="contradict"):
        kernels.attend(pool.sequences[0].q_CNH[:7], pool.cache, layout, None)
    with pytest.raises(RuntimeError, match="head size"):
        kernels.attend_dense(*(torch.zeros(1, 2, 1, 12) for _ in range(3)))
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.silu_mul(torch.zeros(1, 2, dtype=torch.float16))
