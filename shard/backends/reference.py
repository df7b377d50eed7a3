"""Every operation in plain torch: slow, readable, and the oracle of every other backend.

The operations run on any device; the memory functions speak of the host's memory.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.base import CacheShape, LayerCache, Linear, Recording, StepLayout
from tessera.shard.backends.host_memory import (
    free_host_bytes,
    peak_host_bytes,
    reset_host_peak,
    used_host_bytes,
)
from tessera.shard.gumbel import draw
from tessera.shard.quantized import QuantizedWeight
from tessera.shard.survey import survey


def available() -> bool:
    """Plain torch computes wherever torch runs."""
    return True


def create(device: torch.device) -> "ReferenceBackend":
    """The reference operations on any device."""
    return ReferenceBackend(device)


class ReferenceBackend:
    """The definition. Anything that other backends do better, they override."""

    name = "reference"
    float8_cache = True
    runs_ahead = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_cache(self, shape: CacheShape, num_blocks: int) -> list[LayerCache]:
        """See `Backend.new_cache`."""
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_size)

        def pool() -> Tensor:
            return torch.empty(size, dtype=shape.dtype, device=self.device)

        return [LayerCache(pool(), pool()) for _ in range(shape.num_layers)]

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        """See `Backend.linear`."""
        return PlainLinear(weight_OI, bias_O)

    def quantized_linear(self, weight: QuantizedWeight, bias_O: Tensor | None) -> Linear:
        """See `Backend.quantized_linear`. The input is not rounded."""
        return DequantizingLinear(weight, bias_O)

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.add_rms_norm`."""
        residual_TD = x_TD if residual_TD is None else residual_TD + x_TD
        wide_TD = residual_TD.float()
        scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
        return (wide_TD * scale_T1).to(x_TD.dtype) * weight_D, residual_TD

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """See `Backend.silu_mul`."""
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate_and_store(
        self, qkv_TF: Tensor, cos_sin_LH: Tensor, cache: LayerCache, layout: StepLayout
    ) -> Tensor:
        """See `Backend.rotate_and_store`."""
        _, num_kv_heads, block_size, head_size = cache.k_BKPH.shape
        heads_TXH = qkv_TF.reshape(qkv_TF.shape[0], -1, head_size)  # X = N + 2K
        num_heads = heads_TXH.shape[1] - 2 * num_kv_heads
        q_TNH, kv_TXH = heads_TXH[:, :num_heads], heads_TXH[:, num_heads:]
        k_TKH, v_TKH = kv_TXH[:, :num_kv_heads], kv_TXH[:, num_kv_heads:]
        cos_sin_TH = cos_sin_LH[layout.positions_T]
        blocks_T, offsets_T = layout.slots_T // block_size, layout.slots_T % block_size
        dtype = cache.k_BKPH.dtype
        cache.k_BKPH[blocks_T, :, offsets_T] = as_kept(rotate(k_TKH, cos_sin_TH), dtype)
        cache.v_BKPH[blocks_T, :, offsets_T] = as_kept(v_TKH, dtype)
        return rotate(q_TNH, cos_sin_TH)

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """See `Backend.attend`: one sequence after the other, scores in float32."""
        out_TNH = torch.empty_like(q_TNH)
        for s, context_len in enumerate(layout.context_lens):
            first, last = layout.query_start[s], layout.query_start[s + 1]
            if first < last:
                gathered = gather(cache, layout.block_tables_SM[s], context_len)
                k_CKH, v_CKH = (x_CKH.to(q_TNH.dtype) for x_CKH in gathered)
                visible_QC = visible(last - first, context_len, window, self.device)
                q_QNH = q_TNH[first:last]
                out_TNH[first:last] = self.attend_one(q_QNH, k_CKH, v_CKH, visible_QC)
        return out_TNH

    def attend_one(self, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, visible_QC: Tensor) -> Tensor:
        """Softmax attention of one sequence; G query heads share each key/value head."""
        query_len, _, head_size = q_QNH.shape
        q_QKGH = q_QNH.float().reshape(query_len, k_CKH.shape[1], -1, head_size)
        scores_KGQC = torch.einsum("qkgh,ckh->kgqc", q_QKGH, k_CKH.float()) * head_size**-0.5
        weights_KGQC = scores_KGQC.masked_fill(~visible_QC, float("-inf")).softmax(-1)
        out_QKGH = torch.einsum("kgqc,ckh->qkgh", weights_KGQC, v_CKH.float())
        return out_QKGH.flatten(1, 2).to(q_QNH.dtype)

    def attend_dense(self, q_SQNH: Tensor, k_SQNH: Tensor, v_SQNH: Tensor) -> Tensor:
        """See `Backend.attend_dense`."""
        q, k, v = (x.transpose(1, 2) for x in (q_SQNH, k_SQNH, v_SQNH))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def survey(self, logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.survey`."""
        return survey(logits_RV)

    def draw(self, scores_RV: Tensor, keys_R: Tensor) -> Tensor:
        """See `Backend.draw`."""
        return draw(scores_RV, keys_R)

    def free_memory_bytes(self) -> int:
        """See `Backend.free_memory_bytes`."""
        return free_host_bytes()

    def used_memory_bytes(self) -> int:
        """See `Backend.used_memory_bytes`."""
        return used_host_bytes()

    def peak_memory_bytes(self) -> int | None:
        """See `Backend.peak_memory_bytes`: resident memory of the process."""
        return peak_host_bytes()

    def reset_peak_memory(self) -> None:
        """See `Backend.reset_peak_memory`."""
        reset_host_peak()

    def synchronize(self) -> None:
        """See `Backend.synchronize`. On the host everything is finished on return."""

    def mark(self) -> Any:
        """See `Backend.mark`."""
        return time.perf_counter_ns()

    def wait(self, mark: Any) -> None:
        """See `Backend.wait`. On the host everything is finished."""

    def elapsed_ns(self, first: Any, last: Any) -> int:
        """See `Backend.elapsed_ns`."""
        return int(last - first)

    def record(self, work: Callable[[], None], after: Recording | None) -> Recording | None:
        """See `Backend.record`. Nothing is recorded on the host."""
        return None


class PlainLinear:
    """`torch.nn.functional.linear` with the weight as it came."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        return F.linear(x_TI, self.weight_OI, self.bias_O)


class DequantizingLinear:
    """Keeps codes, two of 4 bits in a byte, and makes floats of them at each call."""

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None) -> None:
        codes_OI = weight.codes_OI
        if weight.bits == 4:
            left, right = codes_OI.chunk(2, dim=1)  # whole groups or not: they are only stored so
            codes_OI = left | (right << 4)
        self.weight = replace(weight, codes_OI=codes_OI)
        self.bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        weight = self.weight
        if weight.bits == 4:
            codes_OI = torch.cat((weight.codes_OI & 15, weight.codes_OI >> 4), dim=1)
            weight = replace(weight, codes_OI=codes_OI)
        return F.linear(x_TI, weight.dequantize(x_TI.dtype), self.bias_O)


def rotate(x_TXH: Tensor, cos_sin_TH: Tensor) -> Tensor:
    """Rotary embedding of X heads, computed in float32 (arXiv 2104.09864, "neox" halves)."""
    cos_T1h, sin_T1h = cos_sin_TH[:, None].chunk(2, dim=-1)
    left, right = x_TXH.float().chunk(2, dim=-1)
    rotated = (left * cos_T1h - right * sin_T1h, right * cos_T1h + left * sin_T1h)
    return torch.cat(rotated, dim=-1).to(x_TXH.dtype)


def as_kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a cache of that dtype holds it, see `LayerCache`."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), float("nan")).to(dtype)


def gather(cache: LayerCache, blocks_M: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence in order of position: [context_len, K, H] each."""
    block_size = cache.k_BKPH.shape[2]
    blocks = blocks_M[: -(-context_len // block_size)]
    k_CKH, v_CKH = (
        pool_BKPH[blocks].transpose(1, 2).flatten(0, 1)[:context_len]
        for pool_BKPH in (cache.k_BKPH, cache.v_BKPH)
    )
    return k_CKH, v_CKH


def visible(query_len: int, context_len: int, window: int | None, device: torch.device) -> Tensor:
    """bool [query_len, context_len]: which positions each of the last `query_len` may see."""
    key_C = torch.arange(context_len, device=device)
    query_Q1 = key_C[context_len - query_len :, None]
    visible_QC = key_C <= query_Q1
    return visible_QC if window is None else visible_QC & (key_C > query_Q1 - window)
