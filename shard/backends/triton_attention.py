"""Attention over the paged cache in Triton, after FlashAttention-2 (arXiv 2307.08691).

Query heads that share a key/value head, and neighbouring tokens of a prompt, are the rows of one
matrix product. A decode row's context is cut into a number of parts that depends on the shape of
the batch alone, never on lengths, so that a recorded graph stays right as sequences grow; a second
kernel puts the parts together (arXiv 2311.01282).

Letters as in `base`; in the kernels M rows of a tile, N keys of a tile, D the head size made a
power of two, X parts of a context.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tessera.shard.backends import triton_attention_kernels as kernels
from tessera.shard.backends.base import LayerCache, StepLayout

SMALLEST_DOT = 16  # rows and columns a matrix unit takes at least
MOST_SPLITS = 64
PROGRAMS_PER_UNIT = 4  # decode programs for each multiprocessor that keep its memory pipes full


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut; any values give the same results."""

    rows: int  # query tokens times heads of a group
    keys: int
    warps: int
    stages: int  # of the pipeline; half of them load block ids, half the keys that these lead to


def decode_tiles(head_size: int, dtype: torch.dtype, group: int) -> Tiles:
    """Few rows: what counts is that enough keys are under way.

    With 3 stages the next keys are asked for when these are multiplied, with 5 one tile before.
    """
    row_bytes = _row_bytes(head_size, dtype)
    keys = {256: 64, 512: 32}.get(max(256, row_bytes), 16)
    # Of programs with short rows a multiprocessor holds many; float32 would run out of registers.
    stages = 5 if row_bytes >= 256 and dtype.itemsize == 2 else 3
    return Tiles(_rows_for(group), keys, 4, stages)


def chunk_tiles(head_size: int, dtype: torch.dtype, group: int) -> Tiles:
    """Many rows, as far as shared memory goes (227 KiB on Hopper)."""
    if dtype == torch.float32:  # no matrix unit for it: large tiles only take registers
        return Tiles(max(16, _rows_for(group)), 16, 4, 2)
    if _row_bytes(head_size, dtype) <= 256:
        return Tiles(max(128, _rows_for(group)), 64, 8, 3)
    return Tiles(max(64, _rows_for(group)), 64, 8, 2)


def _rows_for(group: int) -> int:
    return max(SMALLEST_DOT, int(triton.next_power_of_2(group)))


def _row_bytes(head_size: int, dtype: torch.dtype) -> int:
    return _head_block(head_size) * dtype.itemsize


def num_splits(sequences: int, num_kv_heads: int, units: int) -> int:
    """Parts of every context; a power of two, so that few kernels are compiled.

    Args:
        units: multiprocessors of the device.
    """
    wanted = -(-units * PROGRAMS_PER_UNIT // max(1, sequences * num_kv_heads))
    return int(min(MOST_SPLITS, triton.next_power_of_2(wanted)))


def attend_decodes(
    out_TNH: Tensor,
    q_TNH: Tensor,
    cache: LayerCache,
    layout: StepLayout,
    sequences: int,
    window: int | None,
    splits: int,
    tiles: Tiles | None = None,
) -> None:
    """The first `sequences` of a step, of one token each; a context of 0 tokens gives zeros."""
    _, num_heads, head_size = q_TNH.shape
    _, num_kv_heads, block_size, _ = cache.k_BKPH.shape
    group = num_heads // num_kv_heads
    tiles = tiles or decode_tiles(head_size, q_TNH.dtype, group)
    parts = (sequences, num_heads, splits)
    acc_SNXH = out_TNH if splits == 1 else _floats(q_TNH, *parts, head_size)
    peak_SNX = out_TNH if splits == 1 else _floats(q_TNH, *parts)
    sum_SNX = out_TNH if splits == 1 else _floats(q_TNH, *parts)
    head_block = _head_block(head_size)
    kernels.decode[(sequences, num_kv_heads, splits)](
        out_TNH,
        acc_SNXH,
        peak_SNX,
        sum_SNX,
        q_TNH,
        cache.k_BKPH,
        cache.v_BKPH,
        layout.block_tables_SM,
        layout.context_lens_S,
        layout.block_tables_SM.stride(0),
        _scale(head_size),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD=head_size,
        D=head_block,
        POSITIONS=block_size,
        M=tiles.rows,
        N=tiles.keys,
        SPLITS=splits,
        WINDOW=window or 0,
        PRECISION=_precision(q_TNH.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        kernels.combine[(sequences, num_heads)](
            out_TNH,
            acc_SNXH,
            peak_SNX,
            sum_SNX,
            layout.context_lens_S,
            NUM_HEADS=num_heads,
            HEAD=head_size,
            D=head_block,
            N=tiles.keys,
            SPLITS=splits,
            WINDOW=window or 0,
        )


def attend_chunks(
    out_TNH: Tensor,
    q_TNH: Tensor,
    cache: LayerCache,
    layout: StepLayout,
    first: int,
    window: int | None,
    tiles: Tiles | None = None,
) -> None:
    """The sequences of a step from number `first` on, of any number of tokens each."""
    _, num_heads, head_size = q_TNH.shape
    _, num_kv_heads, block_size, _ = cache.k_BKPH.shape
    group = num_heads // num_kv_heads
    tiles = tiles or chunk_tiles(head_size, q_TNH.dtype, group)
    sequences = len(layout.context_lens) - first
    tokens = layout.query_start[-1] - layout.query_start[first]
    # A sequence's tokens may lie in one tile more than they fill: each has a tile to spare.
    most_tiles = tokens // (tiles.rows // group) + sequences
    kernels.chunks[(most_tiles, num_kv_heads)](
        out_TNH,
        q_TNH,
        cache.k_BKPH,
        cache.v_BKPH,
        layout.block_tables_SM,
        layout.query_start_S1,
        layout.context_lens_S,
        layout.block_tables_SM.stride(0),
        first,
        sequences,
        _scale(head_size),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD=head_size,
        D=_head_block(head_size),
        POSITIONS=block_size,
        M=tiles.rows,
        N=tiles.keys,
        WINDOW=window or 0,
        PRECISION=_precision(q_TNH.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _head_block(head_size: int) -> int:
    return max(SMALLEST_DOT, int(triton.next_power_of_2(head_size)))


def _floats(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _scale(head_size: int) -> float:
    """Of scores, for powers of two instead of e."""
    return math.log2(math.e) / math.sqrt(head_size)


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 must not be rounded to 10 bits; others are exact anyway."""
    return "ieee" if dtype == torch.float32 else "tf32"
