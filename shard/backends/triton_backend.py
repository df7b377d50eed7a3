"""Any device that Triton compiles for: own kernels for attention over pages and the small
operations, torch's for the rest. A device's own file adds its memory."""

import logging
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tessera.shard.backends.base import CacheShape, LayerCache, StepLayout
from tessera.shard.backends.flash_prefill import DTYPES, PackedContexts, flash_attend
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.backends.triton_attention import attend_chunks, attend_decodes, num_splits
from tessera.shard.backends.triton_ops import add_rms_norm, rotate_and_store, silu_mul

logger = logging.getLogger(__name__)

FLASH_TOKENS = 512  # of prompts in a step, from which copying their contexts together pays


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
        plan = self._plan_of(layout, cache.k_BKPH.shape[2], q_TNH.dtype)
        decodes = plan.num_decodes
        if decodes:
            splits = num_splits(decodes, cache.k_BKPH.shape[1], self._units)
            attend_decodes(out_TNH, q_TNH, cache, layout, decodes, window, splits)
        if plan.contexts is not None:
            flash_attend(out_TNH[decodes:], q_TNH[decodes:], cache, plan.contexts, window)
        elif plan.num_tokens > decodes:
            attend_chunks(out_TNH, q_TNH, cache, layout, decodes, window)
        return out_TNH

    def _plan_of(self, layout: StepLayout, block_size: int, dtype: torch.dtype) -> _Plan:
        if self._plan is None or self._plan.layout is not layout:
            lengths = [end - start for start, end in pairwise(layout.query_start)]
            decodes = next((s for s, n in enumerate(lengths) if n != 1), len(lengths))
            tokens = layout.query_start[-1]
            contexts = None
            if self.flash and dtype in DTYPES and tokens - decodes >= FLASH_TOKENS:
                contexts = PackedContexts.of(layout, decodes, block_size)
            self._plan = _Plan(layout, decodes, tokens, contexts)
        return self._plan


def kernels_work(backend: TritonBackend) -> bool:
    """Whether the kernels compile on this device and give the reference's results."""
    return _agrees(backend, torch.float32, 1e-4) and _agrees(backend, torch.bfloat16, 5e-2)


def flash_works(device: torch.device) -> bool:
    """Whether torch's FlashAttention can be called there, and gives the reference's results."""
    return _agrees(TritonBackend(device, flash=True), torch.bfloat16, 5e-2, tokens=FLASH_TOKENS)


def _agrees(backend: TritonBackend, dtype: torch.dtype, tolerance: float, tokens: int = 40) -> bool:
    """A decode row, and a prompt with 20 tokens before it, through all operations."""
    try:
        for window in (None, 24):
            got = _trial(backend, dtype, tokens, window)
            expected = _trial(ReferenceBackend(backend.device), dtype, tokens, window)
            for ours, right in zip(got, expected, strict=True):
                if not torch.allclose(ours, right, rtol=tolerance, atol=tolerance):
                    logger.warning("kernels for %s give wrong results", backend.device)
                    return False
    except Exception:  # of a compiler, a driver, an operation that torch no longer has
        logger.warning("kernels for %s cannot be used", backend.device, exc_info=True)
        return False
    return True


def _trial(
    backend: ReferenceBackend, dtype: torch.dtype, tokens: int, window: int | None
) -> list[Tensor]:
    """What the operations give, in float32 on the host: [1 + tokens] tokens, 4 heads over 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(backend.device, dtype)

    num_blocks = -(-(tokens + 20) // 16)
    (cache,) = backend.new_cache(CacheShape(1, 2, 64, 16, dtype), num_blocks + 3)
    for pool_BKPH in (cache.k_BKPH, cache.v_BKPH):
        pool_BKPH.copy_(normal(*pool_BKPH.shape))
    layout = _trial_layout(tokens, num_blocks, backend.device)
    angles_Lh = torch.arange(tokens + 20).float()[:, None] / (1 + torch.arange(32))
    cos_sin_LH = torch.cat([angles_Lh.cos(), angles_Lh.sin()], dim=-1).to(backend.device)
    x_TD, residual_TD = normal(tokens + 1, 512), normal(tokens + 1, 512)
    normed_TD, sum_TD = backend.add_rms_norm(x_TD, residual_TD, normal(512), 1e-5)
    q_TNH = backend.rotate_and_store(normed_TD, cos_sin_LH, cache, layout)
    out_TNH = backend.attend(q_TNH, cache, layout, window)
    results = (normed_TD, sum_TD, q_TNH, out_TNH, backend.silu_mul(normed_TD))
    return [result.float().cpu() for result in results]


def _trial_layout(tokens: int, num_blocks: int, device: torch.device) -> StepLayout:
    """A row at position 36 in the first blocks; a prompt at positions from 20 on."""
    tables_SM = torch.zeros(2, max(3, num_blocks), dtype=torch.int32)
    tables_SM[0, :3] = torch.tensor([2, 0, 1])
    tables_SM[1, :num_blocks] = torch.arange(num_blocks) + 3
    positions_T = torch.cat([torch.tensor([36]), torch.arange(20, tokens + 20)])
    rows_T = (torch.arange(tokens + 1) > 0).long()
    slots_T = tables_SM[rows_T, positions_T // 16].long() * 16 + positions_T % 16
    query_start, context_lens = (0, 1, tokens + 1), (37, tokens + 20)
    return StepLayout(
        positions_T.to(device),
        slots_T.to(device),
        torch.tensor(query_start, dtype=torch.int32, device=device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        tables_SM.to(device),
        query_start,
        context_lens,
    )
