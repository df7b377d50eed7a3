"""Fused small operations in Triton: norm with its addition, rotary embedding with the cache write,
gated activation. Each reads and writes device memory once.

Letters as in `base`; X is all heads of a fused projection, N + 2K. Compiled for GPUs when first
called; with TRITON_INTERPRET=1 they run, slowly, on any device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.shard.backends.base import LayerCache, StepLayout

HEADS_AT_ONCE = 8  # heads of a token that one program rotates
COLUMNS_AT_ONCE = 1024  # of a gated activation


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `Backend.add_rms_norm`. The sum overwrites `residual_TD`."""
    x_TD = x_TD.contiguous()
    normed_TD = torch.empty_like(x_TD)
    num_tokens, width = x_TD.shape
    stream_TD = x_TD if residual_TD is None else residual_TD
    if num_tokens:
        block = triton.next_power_of_2(width)
        _add_rms_norm[(num_tokens,)](
            normed_TD,
            x_TD,
            stream_TD,
            weight_D,
            eps,
            WIDTH=width,
            BLOCK=block,
            ADDS=residual_TD is not None,
            num_warps=min(16, max(1, block // 512)),
        )
    return normed_TD, stream_TD


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """See `Backend.silu_mul`. Rounded once, where the reference rounds twice."""
    gate_up_TF = gate_up_TF.contiguous()
    num_tokens, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out = gate_up_TF.new_empty(num_tokens, width)
    if num_tokens:
        block = min(COLUMNS_AT_ONCE, triton.next_power_of_2(width))
        grid = (num_tokens, triton.cdiv(width, block))
        _silu_mul[grid](out, gate_up_TF, WIDTH=width, BLOCK=block)
    return out


def rotate_and_store(
    qkv_TF: Tensor, cos_sin_LH: Tensor, cache: LayerCache, layout: StepLayout
) -> Tensor:
    """See `Backend.rotate_and_store`."""
    _, num_kv_heads, block_size, head_size = cache.k_BKPH.shape
    qkv_TF = qkv_TF.contiguous()
    num_tokens, features = qkv_TF.shape
    num_all = features // head_size
    num_heads = num_all - 2 * num_kv_heads
    q_TNH = qkv_TF.new_empty(num_tokens, num_heads, head_size)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(num_all, HEADS_AT_ONCE))
        _rotate_and_store[grid](
            q_TNH,
            cache.k_BKPH,
            cache.v_BKPH,
            qkv_TF,
            cos_sin_LH,
            layout.positions_T,
            layout.slots_T,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD=head_size,
            HALF_BLOCK=triton.next_power_of_2(head_size // 2),
            POSITIONS=block_size,
            HEADS=HEADS_AT_ONCE,
        )
    return q_TNH


@triton.jit
def _add_rms_norm(
    normed, x, stream, weight, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr
):
    """One row: stream += x, then its norm. Without ADDS `stream` is not touched."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row + column, mask=inside, other=0.0)
    dtype = value.dtype
    wide = value.to(tl.float32)
    if ADDS:
        wide += tl.load(stream + row + column, mask=inside, other=0.0).to(tl.float32)
        wide = wide.to(dtype).to(tl.float32)
        tl.store(stream + row + column, wide.to(dtype), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    rounded = (wide * scale).to(dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + column, (rounded * weights).to(dtype), mask=inside)


@triton.jit
def _silu_mul(out, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Part of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = gate_up + row * 2 * WIDTH + column
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    result = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(out + row * WIDTH + column, result.to(gate.dtype), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotate_and_store(
    q,
    k_cache,
    v_cache,
    qkv,
    cos_sin,
    positions,
    slots,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Some heads of a token: queries to `q`, keys and values to the token's slot."""
    HALF: tl.constexpr = HEAD // 2
    NUM_ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_ALL) & (half < HALF)
    source = qkv + (token * NUM_ALL + head) * HEAD + half
    left = tl.load(source, mask=inside, other=0.0)
    right = tl.load(source + HALF, mask=inside, other=0.0)
    angles = cos_sin + tl.load(positions + token) * HEAD + half
    cos = tl.load(angles, mask=half < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=half < HALF, other=0.0)
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    new_left = (wide_left * cos - wide_right * sin).to(left.dtype)
    new_right = (wide_right * cos + wide_left * sin).to(left.dtype)

    queries = inside & (head < NUM_HEADS)
    target = q + (token * NUM_HEADS + head) * HEAD + half
    tl.store(target, new_left, mask=queries)
    tl.store(target + HALF, new_right, mask=queries)

    slot = tl.load(slots + token).to(tl.int64)
    block = slot // POSITIONS * (NUM_KV_HEADS * POSITIONS * HEAD) + slot % POSITIONS * HEAD
    kv_head = head - NUM_HEADS
    keys = inside & (kv_head >= 0) & (kv_head < NUM_KV_HEADS)
    target = k_cache + block + kv_head * (POSITIONS * HEAD) + half
    tl.store(target, new_left, mask=keys)
    tl.store(target + HALF, new_right, mask=keys)

    kv_head -= NUM_KV_HEADS
    values = inside & (kv_head >= 0)
    target = v_cache + block + kv_head * (POSITIONS * HEAD) + half
    tl.store(target, left, mask=values)
    tl.store(target + HALF, right, mask=values)
