"""Any device that Triton compiles for: own kernels for attention over pages and the small
operations, torch's for the rest. A device's own file adds its memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tessera.shard.backends.base import LayerCache, StepLayout
from tessera.shard.backends.flash_prefill import PackedContexts, flash_attend, flash_fits
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.trial import agrees
from tessera.shard.backends.triton_attention import attend_chunks, attend_decodes, num_splits
from tessera.shard.backends.triton_ops import add_rms_norm, draw, rotate_and_store, silu_mul

FLASH_TOKENS = 512  # of a prompt in a step, from which copying its context pays


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of a step do alike."""

    layout: StepLayout
    num_decodes: int  # sequences of one token, before all others
    num_tokens: int
    contexts: PackedContexts | None  # of the others, for torch's kernel


class TritonBackend(FusedAttentionBackend):
    """See `Backend`. float32, float16 and bfloat16; even head sizes up to 256."""

    name = "triton"
    float8_cache = False  # unless the device converts such numbers

    def __init__(self, device: torch.device, units: int = 1, flash: bool = False) -> None:
        """`units`: multiprocessors of the device; `flash`: torch's FlashAttention works on it."""
        super().__init__(device)
        self._units = units
        self.flash = flash
        self._plan: _Plan | None = None  # of the last layout seen: that of all layers of a step

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.add_rms_norm`. The sum overwrites `residual_TD`."""
        return add_rms_norm(x_TD, residual_TD, weight_D, eps)

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """See `Backend.silu_mul`. Rounded once, where the reference rounds twice."""
        return silu_mul(gate_up_TF)

    def rotate_and_store(
        self, qkv_TF: Tensor, cos_sin_LH: Tensor, cache: LayerCache, layout: StepLayout
    ) -> Tensor:
        """See `Backend.rotate_and_store`."""
        return rotate_and_store(qkv_TF, cos_sin_LH, cache, layout)

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """See `Backend.attend`."""
        q_TNH = q_TNH.contiguous()
        out_TNH = torch.empty_like(q_TNH)
        plan = self._plan_of(layout, cache.k_BKPH.shape[2], q_TNH)
        decodes = plan.num_decodes
        if decodes:
            splits = num_splits(decodes, cache.k_BKPH.shape[1], self._units)
            attend_decodes(out_TNH, q_TNH, cache, layout, decodes, window, splits)
        if plan.contexts is not None:
            flash_attend(out_TNH[decodes:], q_TNH[decodes:], cache, plan.contexts, window)
        elif plan.num_tokens > decodes:
            attend_chunks(out_TNH, q_TNH, cache, layout, decodes, window)
        return out_TNH

    def draw(self, scores_RV: Tensor, keys_R: Tensor) -> Tensor:
        """See `Backend.draw`."""
        return draw(scores_RV, keys_R)

    def _plan_of(self, layout: StepLayout, block_size: int, q_TNH: Tensor) -> _Plan:
        if self._plan is None or self._plan.layout is not layout:
            lengths = [end - start for start, end in pairwise(layout.query_start)]
            decodes = next((s for s, n in enumerate(lengths) if n != 1), len(lengths))
            contexts = None
            others = slice(decodes, None)
            pays = copying_pays(lengths[others], layout.context_lens[others])
            if self.flash and pays and flash_fits(q_TNH):
                contexts = PackedContexts.of(layout, decodes, block_size)
            self._plan = _Plan(layout, decodes, layout.query_start[-1], contexts)
        return self._plan


def copying_pays(lengths: Sequence[int], context_lens: Sequence[int]) -> bool:
    """Whether a key that is copied is read by `FLASH_TOKENS` new tokens, on average over all keys.

    Many short prompts that share a long beginning would copy it for each of them, which takes
    longer than to read it and memory that no trial has shown.
    """
    read = sum(length * context for length, context in zip(lengths, context_lens, strict=True))
    return read > 0 and read >= FLASH_TOKENS * sum(context_lens)


def kernels_work(backend: TritonBackend) -> bool:
    """Whether the kernels compile on this device and give the reference's results."""
    return agrees(backend, torch.float32, 1e-4) and agrees(backend, torch.bfloat16, 5e-2)


def float8_works(backend: TritonBackend) -> bool:
    """The same with caches in 8 bits, where neighbours in the format are an eighth apart."""
    formats = (torch.float8_e4m3fn, torch.float8_e5m2)
    return all(agrees(backend, torch.bfloat16, 0.1, cache_dtype=kept) for kept in formats)


def flash_works(device: torch.device) -> bool:
    """Whether torch's FlashAttention can be called there, and gives the reference's results."""
    return agrees(TritonBackend(device, flash=True), torch.bfloat16, 5e-2, tokens=FLASH_TOKENS)
