"""What only Triton's kernels promise. Run by `test_triton.py`, interpreted."""

import pytest
import torch

from tessera.shard.backends import triton_backend
from tessera.shard.backends.base import StepLayout
from tessera.shard.backends.reference import as_kept
from tessera.shard.backends.trial import agrees
from tessera.shard.backends.triton_attention import Tiles, attend_chunks, attend_decodes, num_splits
from tessera.shard.backends.triton_backend import TritonBackend, copying_pays
from tessera.shard.models.dtype import CACHE_DTYPES
from tests.shard.backends.pool import CPU, NAN, Pool, assert_close, stored_rows

HEADS = (6, 2, 24)


def decodes(lengths: list[int], dtype: torch.dtype) -> tuple[Pool, torch.Tensor, StepLayout]:
    """Sequences whose last token is computed; queries and layout of that step."""
    pool = Pool(lengths, HEADS, dtype)
    for s, length in enumerate(lengths):
        pool.fill(s, 0, length)
    parts = [(s, length - 1, length) for s, length in enumerate(lengths)]
    q_TNH = torch.cat([pool.sequences[s].q_CNH[-1:] for s in range(len(lengths))])
    return pool, q_TNH, pool.layout(parts)


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [(Tiles(16, 16, 4, 1), torch.float32), (Tiles(32, 64, 4, 2), torch.float16)],
)
def test_triton_decodes_in_any_parts(
    tiles: Tiles, splits: int, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [1, 16, 33, 100]
    pool, q_TNH, layout = decodes(lengths, dtype)
    out_TNH = torch.full_like(q_TNH, NAN)
    attend_decodes(out_TNH, q_TNH, pool.cache, layout, len(lengths), window, splits, tiles)
    for s, length in enumerate(lengths):
        assert_close(out_TNH[s : s + 1], pool.expected(s, length - 1, length, window))


@pytest.mark.parametrize("splits", [1, 8])
def test_triton_rows_of_no_sequence_give_zeros(splits: int) -> None:
    """Recorded steps are filled up with them."""
    pool, q_TNH, layout = decodes([40, 40, 40], torch.float32)
    layout.context_lens_S[1] = 0
    out_TNH = torch.full_like(q_TNH, NAN)
    attend_decodes(out_TNH, q_TNH, pool.cache, layout, 3, None, splits)
    assert (out_TNH[1] == 0).all()
    assert_close(out_TNH[2:], pool.expected(2, 39, 40))


def test_triton_splits_depend_on_the_batch_alone() -> None:
    """A recording is replayed with other lengths: what the host said of them must not matter."""
    pool, q_TNH, layout = decodes([90, 5], torch.float32)
    recorded = StepLayout(
        layout.positions_T,
        layout.slots_T,
        layout.query_start_S1,
        layout.context_lens_S,
        layout.block_tables_SM,
        layout.query_start,
        context_lens=(1, 1),
    )
    out_TNH = TritonBackend(CPU, units=12).attend(q_TNH, pool.cache, recorded, None)
    assert_close(out_TNH[:1], pool.expected(0, 89, 90))
    assert_close(out_TNH[1:], pool.expected(1, 4, 5))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [(Tiles(16, 16, 4, 1), torch.float16), (Tiles(64, 32, 4, 2), torch.float32)],
)
def test_triton_chunks_in_any_tiles(tiles: Tiles, window: int | None, dtype: torch.dtype) -> None:
    pool = Pool([70, 3, 41], HEADS, dtype)
    pool.fill(0, 0, 40)
    pool.fill(2, 0, 1)
    parts = [(0, 40, 70), (1, 0, 3), (2, 1, 41)]
    for part in parts:
        pool.fill(*part)
    q_TNH = torch.cat([pool.sequences[s].q_CNH[first:last] for s, first, last in parts])
    out_TNH = torch.full_like(q_TNH, NAN)
    attend_chunks(out_TNH, q_TNH, pool.cache, pool.layout(parts), 0, window, tiles)
    for part, got in zip(parts, torch.split(out_TNH, [30, 3, 40]), strict=True):
        assert_close(got, pool.expected(*part, window))


@pytest.mark.parametrize("kept", CACHE_DTYPES.values(), ids=CACHE_DTYPES)
def test_triton_reads_caches_in_8_bits(kept: torch.dtype) -> None:
    pool = Pool([17, 40], HEADS, torch.float16, cache_dtype=kept)
    backend = TritonBackend(CPU, units=12)
    for parts in ([(0, 0, 16), (1, 0, 39)], [(0, 16, 17), (1, 39, 40)]):
        for part, got in zip(parts, pool.step(backend, parts), strict=True):
            assert_close(got, pool.expected(*part))


@pytest.mark.parametrize("kept", CACHE_DTYPES.values(), ids=CACHE_DTYPES)
def test_triton_writes_caches_in_8_bits(kept: torch.dtype) -> None:
    """Numbers that it holds, and too large ones: the interpreter rounds others wrongly."""
    pool = Pool([40], (2, 1, 32), torch.float32, cache_dtype=kept)
    layout = pool.layout([(0, 0, 40)])
    qkv_TF = torch.randn(40, 4 * 32, generator=torch.Generator().manual_seed(0))
    qkv_TF = as_kept(qkv_TF * torch.logspace(-3, 5, 40)[:, None], kept).float()
    qkv_TF[3, 90:100] = torch.tensor([1e6, -1e6]).repeat(5)
    plain_LH = torch.cat([torch.ones(50, 16), torch.zeros(50, 16)], 1)
    TritonBackend(CPU).rotate_and_store(qkv_TF, plain_LH, pool.cache, layout)
    stored = stored_rows(pool.cache, layout.slots_T)
    assert torch.equal(stored.k_BKPH[:, 0].float(), as_kept(qkv_TF[:, 64:96], kept).float())
    assert torch.equal(stored.v_BKPH[:, 0].float(), as_kept(qkv_TF[:, 96:], kept).float())


def test_triton_kernels_pass_the_trial_of_a_device() -> None:
    assert agrees(TritonBackend(CPU, units=12), torch.float32, 1e-4)


def test_triton_kernels_that_are_wrong_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonBackend(CPU)
    monkeypatch.setattr(backend, "silu_mul", lambda x_TF: x_TF[:, : x_TF.shape[1] // 2])
    assert not agrees(backend, torch.float32, 1e-4)


def test_triton_cuts_contexts_of_few_sequences_only() -> None:
    assert num_splits(1, 8, 132) == 64
    assert num_splits(32, 8, 132) == 4
    assert num_splits(256, 8, 132) == 1
    splits = [num_splits(batch, 8, 132) for batch in range(1, 257)]
    assert splits == sorted(splits, reverse=True)
    assert all(each & (each - 1) == 0 for each in splits)


def test_triton_draws_no_score_that_is_not_a_number() -> None:
    """Beside one, hardware may find the largest past the end of the row."""
    scores_RV = torch.randn(4, 2500, generator=torch.Generator().manual_seed(0))
    keys_R = torch.arange(4)
    expected = TritonBackend(CPU).draw(scores_RV, keys_R)
    others = torch.ones(4, 2500, dtype=torch.bool).scatter(1, expected[:, None], False)
    scores_RV[others & (torch.arange(2500) % 3 == 0)] = NAN
    assert torch.equal(TritonBackend(CPU).draw(scores_RV, keys_R), expected)


@pytest.mark.parametrize(
    ("parts", "pays"),
    [
        ([(0, 0, 512)], True),
        ([(0, 200, 712)], True),
        ([(0, 0, 511)], False),
        ([(0, 0, 512), (1, 500, 501), (2, 500, 501)], False),
        ([(n, 0, 128) for n in range(8)], False),
        ([(0, 0, 1000), (1, 0, 300)], True),
        ([(0, 0, 0)], False),
        ([], False),
    ],
)
def test_triton_copies_contexts_that_many_new_tokens_read(
    parts: list[tuple[int, int, int]], pays: bool
) -> None:
    lengths = [last - first for _, first, last in parts]
    assert copying_pays(lengths, [last for _, _, last in parts]) == pays


def test_triton_leaves_long_prompts_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        triton_backend, "flash_attend", lambda out_TNH, *_: asked.append(out_TNH.zero_().shape[0])
    )
    pool = Pool([600, 20], (2, 1, 16), torch.float16)
    backend = TritonBackend(CPU, flash=True)
    pool.fill(1, 0, 19)
    for parts, of_flash in (
        ([(1, 19, 20), (0, 0, 550)], [550]),
        ([(1, 19, 20), (0, 550, 600)], []),
    ):
        asked.clear()
        decode = pool.step(backend, parts)[0]
        assert asked == of_flash
        assert_close(decode, pool.expected(1, 19, 20))
