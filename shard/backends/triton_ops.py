"""Fused small operations in Triton: norm with its addition, rotary embedding with the cache write,
gated activation, draw of a token. Each reads and writes device memory once.

Letters as in `base`; X is all heads of a fused projection, N + 2K. Compiled for GPUs when first
called; with TRITON_INTERPRET=1 they run, slowly, on any device.
"""

import torch
import triton
from torch import Tensor

from tessera.shard.backends import triton_ops_kernels as kernels
from tessera.shard.backends.base import LayerCache, StepLayout

HEADS_AT_ONCE = 8  # heads of a token that one program rotates
COLUMNS_AT_ONCE = 1024  # of a gated activation
SCORES_AT_ONCE = 2048  # of a row from which a token is drawn


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
        kernels.add_rms_norm[(num_tokens,)](
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
        kernels.silu_mul[grid](out, gate_up_TF, WIDTH=width, BLOCK=block)
    return out


def rotate_and_store(
    qkv_TF: Tensor, cos_sin_LH: Tensor, cache: LayerCache, layout: StepLayout
) -> Tensor:
    """See `Backend.rotate_and_store`."""
    _, num_kv_heads, block_size, head_size = cache.k_BKPH.shape
    kept = cache.k_BKPH.dtype
    qkv_TF = qkv_TF.contiguous()
    num_tokens, features = qkv_TF.shape
    num_all = features // head_size
    num_heads = num_all - 2 * num_kv_heads
    q_TNH = qkv_TF.new_empty(num_tokens, num_heads, head_size)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(num_all, HEADS_AT_ONCE))
        kernels.rotate_and_store[grid](
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
            LARGEST=int(torch.finfo(kept).max) if kept.itemsize == 1 else 0,
        )
    return q_TNH


def draw(scores_RV: Tensor, keys_R: Tensor) -> Tensor:
    """See `Backend.draw`."""
    scores_RV, keys_R = scores_RV.contiguous(), keys_R.contiguous()
    num_rows, vocabulary = scores_RV.shape
    ids_R = keys_R.new_empty(num_rows)
    if num_rows:
        kernels.draw[(num_rows,)](
            ids_R, scores_RV, keys_R, vocabulary, BLOCK=SCORES_AT_ONCE, num_warps=8
        )
    return ids_R
