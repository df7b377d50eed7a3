"""The kernels of attention over the paged cache; `triton_attention` launches them.

Letters as in `base`; M rows of a tile, N keys of a tile, D the head size made a power of two, X
parts of a context. Arguments are pointers and integers; those in capitals are known when a kernel
is compiled. Scores are made for powers of two: `scale` includes log2(e).
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1.0e30)  # below any score, and finite: two of it differ by 0, not by NaN


@triton.jit
def _attend_keys(
    acc_MD,
    peak_M,
    sum_M,
    q_MD,
    position_M,
    k_head,
    v_head,
    table,
    first,
    last,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    POSITIONS: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with the keys [first, last). Without MASKED all rows see them, and tiles are whole."""
    column_D = tl.arange(0, D)
    real_D = column_D < HEAD
    for start in range(first, last, N):
        key_N = start + tl.arange(0, N)
        there_N = key_N < last
        if MASKED:
            block_N = tl.load(table + key_N // POSITIONS, mask=there_N, other=0)
        else:
            block_N = tl.load(table + key_N // POSITIONS)
        row_N = block_N.to(tl.int64) * (NUM_KV_HEADS * POSITIONS * HEAD) + key_N % POSITIONS * HEAD
        k_ptr = k_head + row_N[None, :] + column_D[:, None]
        v_ptr = v_head + row_N[:, None] + column_D[None, :]
        if MASKED:
            k_DN = tl.load(k_ptr, mask=there_N[None, :] & real_D[:, None], other=0.0)
            v_ND = tl.load(v_ptr, mask=there_N[:, None] & real_D[None, :], other=0.0)
        elif HEAD != D:
            k_DN = tl.load(k_ptr, mask=real_D[:, None], other=0.0)
            v_ND = tl.load(v_ptr, mask=real_D[None, :], other=0.0)
        else:
            k_DN = tl.load(k_ptr)
            v_ND = tl.load(v_ptr)
        k_DN, v_ND = k_DN.to(q_MD.dtype), v_ND.to(q_MD.dtype)  # of a cache in 8 bits
        score_MN = tl.dot(q_MD, k_DN, input_precision=PRECISION) * scale
        if MASKED:
            sees_MN = there_N[None, :] & (key_N[None, :] <= position_M[:, None])
            if WINDOW:
                sees_MN = sees_MN & (key_N[None, :] > position_M[:, None] - WINDOW)
            score_MN = tl.where(sees_MN, score_MN, float("-inf"))
        higher_M = tl.maximum(peak_M, tl.max(score_MN, 1))
        weight_MN = tl.exp2(score_MN - higher_M[:, None])
        shrink_M = tl.exp2(peak_M - higher_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
        acc_MD = tl.dot(
            weight_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision=PRECISION
        )
        peak_M = higher_M
    return acc_MD, peak_M, sum_M


@triton.jit
def _part_of_context(context, split, N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr):
    """The keys [first, last) of a part of a decode row's context; first >= last: it is empty."""
    start = context * 0
    if WINDOW:
        start = tl.maximum(context - WINDOW, 0)
    each = tl.cdiv(tl.cdiv(context - start, N), SPLITS) * N
    first = start + split * each
    return first, tl.minimum(first + each, context)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["tables", "context_lens"],
)
def decode(
    out,
    accs,
    peaks,
    sums,
    q,
    k_cache,
    v_cache,
    tables,
    context_lens,
    table_stride,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    POSITIONS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the context of a decode row, for the query heads of one key/value head."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    first, last = _part_of_context(context, split, N, SPLITS, WINDOW)
    if (SPLITS > 1) & (first >= last):
        return
    row_M = tl.arange(0, M)
    column_D = tl.arange(0, D)
    # Row of a [sequences, heads] matrix.
    head_M = (sequence * NUM_KV_HEADS + kv_head).to(tl.int64) * GROUP + row_M
    real_MD = (row_M[:, None] < GROUP) & (column_D[None, :] < HEAD)
    q_MD = tl.load(q + head_M[:, None] * HEAD + column_D[None, :], mask=real_MD, other=0.0)
    acc_MD = tl.zeros([M, D], tl.float32)
    peak_M = tl.full([M], NOTHING, tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    position_M = row_M * 0 + context  # what a window hides has been left out
    k_head = k_cache + kv_head * (POSITIONS * HEAD)
    v_head = v_cache + kv_head * (POSITIONS * HEAD)
    table = tables + sequence.to(tl.int64) * table_stride
    whole = first + tl.maximum(last - first, 0) // N * N
    acc_MD, peak_M, sum_M = _attend_keys(
        acc_MD, peak_M, sum_M, q_MD, position_M, k_head, v_head, table, first, whole, scale,
        NUM_KV_HEADS, HEAD, D, POSITIONS, N, 0, False, PRECISION,
    )  # fmt: skip
    acc_MD, peak_M, sum_M = _attend_keys(
        acc_MD, peak_M, sum_M, q_MD, position_M, k_head, v_head, table, whole, last, scale,
        NUM_KV_HEADS, HEAD, D, POSITIONS, N, 0, True, PRECISION,
    )  # fmt: skip
    if SPLITS == 1:
        sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)  # an empty context
        result_MD = (acc_MD / sum_M[:, None]).to(out.dtype.element_ty)
        tl.store(out + head_M[:, None] * HEAD + column_D[None, :], result_MD, mask=real_MD)
    else:
        part_M = head_M * SPLITS + split
        tl.store(accs + part_M[:, None] * HEAD + column_D[None, :], acc_MD, mask=real_MD)
        tl.store(peaks + part_M, peak_M, mask=row_M < GROUP)
        tl.store(sums + part_M, sum_M, mask=row_M < GROUP)


@triton.jit(do_not_specialize_on_alignment=["context_lens"])
def combine(
    out,
    accs,
    peaks,
    sums,
    context_lens,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One query head of a decode row from the parts of its context."""
    sequence = tl.program_id(0)
    head = sequence.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    context = tl.load(context_lens + sequence)
    split_X = tl.arange(0, SPLITS)
    column_D = tl.arange(0, D)
    first_X, last_X = _part_of_context(context, split_X, N, SPLITS, WINDOW)
    there_X = first_X < last_X  # the others were not written
    part_X = head * SPLITS + split_X
    peak_X = tl.load(peaks + part_X, mask=there_X, other=NOTHING)
    sum_X = tl.load(sums + part_X, mask=there_X, other=0.0)
    there_XD = there_X[:, None] & (column_D[None, :] < HEAD)
    acc_XD = tl.load(accs + part_X[:, None] * HEAD + column_D[None, :], mask=there_XD, other=0.0)
    weight_X = tl.exp2(peak_X - tl.max(peak_X, 0))
    total = tl.sum(sum_X * weight_X, 0)
    total = tl.where(total == 0.0, 1.0, total)
    result_D = tl.sum(acc_XD * weight_X[:, None], 0) / total
    target = out + head * HEAD + column_D
    tl.store(target, result_D.to(out.dtype.element_ty), mask=column_D < HEAD)


@triton.jit
def _owner(tile, query_start, first, sequences, TOKENS: tl.constexpr):
    """Which of the sequences from `first` on a tile belongs to, and its number there."""
    base = tl.load(query_start + first)
    low = first * 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        before = (tl.load(query_start + first + middle) - base) // TOKENS + middle
        if before <= tile:
            low = middle + 1
        else:
            high = middle
    owner = low - 1
    before = (tl.load(query_start + first + owner) - base) // TOKENS + owner
    return first + owner, tile - before


@triton.jit(
    do_not_specialize=["table_stride", "first", "sequences"],
    do_not_specialize_on_alignment=["tables", "query_start", "context_lens"],
)
def chunks(
    out,
    q,
    k_cache,
    v_cache,
    tables,
    query_start,
    context_lens,
    table_stride,
    first,
    sequences,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    POSITIONS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some neighbouring tokens of one sequence, for the query heads of one key/value head."""
    TOKENS: tl.constexpr = M // GROUP
    kv_head = tl.program_id(1)
    # Late tiles see most keys: they begin first, so that none of them is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, tile = _owner(tile, query_start, first, sequences, TOKENS)
    begin = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - begin
    if tile * TOKENS >= length:
        return
    context = tl.load(context_lens + sequence)
    row_M = tl.arange(0, M)
    column_D = tl.arange(0, D)
    token_M = tile * TOKENS + row_M // GROUP
    real_M = (row_M < TOKENS * GROUP) & (token_M < length)
    real_MD = real_M[:, None] & (column_D[None, :] < HEAD)
    head_M = (begin + token_M).to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP
    head_M += row_M % GROUP
    q_MD = tl.load(q + head_M[:, None] * HEAD + column_D[None, :], mask=real_MD, other=0.0)
    acc_MD = tl.zeros([M, D], tl.float32)
    peak_M = tl.full([M], NOTHING, tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    position = context - length + tile * TOKENS  # of the first token
    position_M = context - length + token_M
    k_head = k_cache + kv_head * (POSITIONS * HEAD)
    v_head = v_cache + kv_head * (POSITIONS * HEAD)
    table = tables + sequence.to(tl.int64) * table_stride
    last = tl.minimum(position + TOKENS, context)
    if WINDOW:
        start = tl.maximum(position - WINDOW + 1, 0) // N * N
    else:
        start = (position + 1) // N * N  # before it, every token sees every key
        acc_MD, peak_M, sum_M = _attend_keys(
            acc_MD, peak_M, sum_M, q_MD, position_M, k_head, v_head, table, 0, start, scale,
            NUM_KV_HEADS, HEAD, D, POSITIONS, N, 0, False, PRECISION,
        )  # fmt: skip
    acc_MD, peak_M, sum_M = _attend_keys(
        acc_MD, peak_M, sum_M, q_MD, position_M, k_head, v_head, table, start, last, scale,
        NUM_KV_HEADS, HEAD, D, POSITIONS, N, WINDOW, True, PRECISION,
    )  # fmt: skip
    # A row that sees nothing is not one that is stored; it must not warn of a division by zero.
    sum_M = tl.where(real_M, sum_M, 1.0)
    result_MD = (acc_MD / sum_M[:, None]).to(out.dtype.element_ty)
    tl.store(out + head_M[:, None] * HEAD + column_D[None, :], result_MD, mask=real_MD)
