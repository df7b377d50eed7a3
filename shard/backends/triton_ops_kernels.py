"""The kernels of the small operations; `triton_ops` launches them.

Arguments are pointers and integers; those in capitals are known when a kernel is compiled.
"""

import triton
import triton.language as tl

from tessera.shard import gumbel

GOLDEN = tl.constexpr(gumbel.GOLDEN)
MIX_1 = tl.constexpr(gumbel.MIX_1)
MIX_2 = tl.constexpr(gumbel.MIX_2)
UNIT = tl.constexpr(2.0**-52)


@triton.jit
def add_rms_norm(
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
def silu_mul(out, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
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
def rotate_and_store(
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
    LARGEST: tl.constexpr,
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
    tl.store(target, _as_kept(new_left, k_cache, LARGEST), mask=keys)
    tl.store(target + HALF, _as_kept(new_right, k_cache, LARGEST), mask=keys)

    kv_head -= NUM_KV_HEADS
    values = inside & (kv_head >= 0)
    target = v_cache + block + kv_head * (POSITIONS * HEAD) + half
    tl.store(target, _as_kept(left, v_cache, LARGEST), mask=values)
    tl.store(target + HALF, _as_kept(right, v_cache, LARGEST), mask=values)


@triton.jit
def _as_kept(value, cache, LARGEST: tl.constexpr):
    """In the cache's dtype; LARGEST is the largest number of one of 8 bits, else 0."""
    if LARGEST:
        wide = value.to(tl.float32)
        inside = tl.minimum(tl.maximum(wide, -LARGEST), LARGEST)
        value = tl.where(wide - wide == 0.0, inside, float("nan"))
    return value.to(cache.dtype.element_ty)


# One kernel for every vocabulary: the trial at the start has compiled it for the first request.
@triton.jit(
    do_not_specialize=["vocabulary"], do_not_specialize_on_alignment=["ids", "scores", "keys"]
)
def draw(ids, scores, keys, vocabulary, BLOCK: tl.constexpr):
    """One row: argmax(score - log(-log(u))), the numbers u as `gumbel.uniforms` makes them.

    A score that is NaN is never drawn: beside one, argmax may name a place past the row's end.
    """
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    best = tl.full([], float("-inf"), tl.float64)
    best_id = tl.full([], 0, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z = (column + 1).to(tl.uint64) * GOLDEN + key
        z = (z ^ (z >> 30)) * MIX_1
        z = (z ^ (z >> 27)) * MIX_2
        z = z ^ (z >> 31)
        uniform = ((z >> 12).to(tl.float64) + 0.5) * UNIT
        score = tl.load(scores + row * vocabulary + column, mask=inside, other=float("-inf"))
        score = tl.where(score == score, score, float("-inf"))
        value = score.to(tl.float64) - tl.log(-tl.log(uniform))
        highest = tl.max(value, 0)
        if highest > best:
            best_id = first + tl.argmax(value, 0)
            best = highest
    tl.store(ids + row, best_id.to(tl.int64))
