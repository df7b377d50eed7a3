"""Intel's extension of torch (IPEX): attention over pages, rotary embedding, norms, 4-bit weights.

Archived by Intel; its last release works with torch 2.8 alone. Its builds for processors and for
GPUs have the same functions, so the tests run them on processors. On GPUs never run on hardware.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.base import Backend, CacheShape, LayerCache, Linear, StepLayout
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.ipex_linear import IpexLinear, fits, ipex_linear_works
from tessera.shard.backends.ipex_version import ipex_fits, what_is_installed
from tessera.shard.backends.trial import agrees
from tessera.shard.backends.xpu import XpuDevice
from tessera.shard.errors import DeviceError
from tessera.shard.quantized import QuantizedWeight

logger = logging.getLogger(__name__)

POSITIONS = 16  # of a block on GPUs, or a multiple of them


def available() -> bool:
    """Whether it is installed beside its own torch."""
    return ipex_fits("cpu")


def create(device: torch.device) -> Backend:
    """The backend of a processor or a GPU.

    Raises:
        DeviceError: it is not installed, not for this device, or gives wrong results on it.
    """
    if not ipex_fits(device.type):
        raise DeviceError(f"BACKEND=ipex on {device} needs {what_is_installed(device.type)}")
    backend = working_backend(device)
    if backend is None:
        raise DeviceError(
            f"BACKEND=ipex: its functions do not work on {device}, see the log; set BACKEND=auto"
        )
    return backend


def working_backend(device: torch.device) -> "IpexBackend | None":
    """The backend, if it gives the reference's results on this device. `ipex_fits` must hold."""
    try:
        backend = IpexXpuBackend(device) if device.type == "xpu" else IpexBackend(device)
    except Exception:  # it is imported here, and loads libraries of its own
        logger.warning("IPEX cannot be imported", exc_info=True)
        return None
    return backend if agrees(backend, torch.bfloat16, 5e-2) else None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of a step do alike."""

    layout: StepLayout
    context_start_S1: Tensor  # int32, sums of the contexts before
    longest_query: int
    longest_context: int


class IpexBackend(FusedAttentionBackend):
    """See `Backend`. float32, float16 and bfloat16."""

    name = "ipex"
    float8_cache = False  # its functions read keys and values in the dtype of the queries

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Where versions do not fit, importing it ends the process or fails oddly: see `ipex_fits`.
        from intel_extension_for_pytorch import llm

        self._pages = llm.modules.PagedAttention
        self._functions = llm.functional
        self._plan: _Plan | None = None  # of the last layout seen: that of all layers of a step

    @cached_property
    def _linear_works(self) -> bool:
        return ipex_linear_works(self.device)

    def quantized_linear(self, weight: QuantizedWeight, bias_O: Tensor | None) -> Linear:
        """See `Backend.quantized_linear`. It has nothing for 8 bits in groups."""
        if fits(weight) and self._linear_works:
            return IpexLinear(weight, bias_O)
        return super().quantized_linear(weight, bias_O)

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.add_rms_norm`."""
        stream_TD = x_TD if residual_TD is None else residual_TD + x_TD
        normed_TD = self._functions.rms_norm(stream_TD.contiguous(), weight_D, eps)
        return normed_TD, stream_TD

    def rotate_and_store(
        self, qkv_TF: Tensor, cos_sin_LH: Tensor, cache: LayerCache, layout: StepLayout
    ) -> Tensor:
        """See `Backend.rotate_and_store`."""
        _, num_kv_heads, _, head_size = cache.k_BKPH.shape
        heads_TXH = qkv_TF.reshape(qkv_TF.shape[0], -1, head_size)  # X = N + 2K
        sizes = [heads_TXH.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads]
        q_TNH, k_TKH, v_TKH = torch.split(heads_TXH, sizes, dim=1)
        cos_T1h, sin_T1h = self._angles(cos_sin_LH[layout.positions_T], q_TNH.dtype)
        q_TNH, k_TKH = (x.clone(memory_format=torch.contiguous_format) for x in (q_TNH, k_TKH))
        # In place; halves are rotated against each other.
        self._functions.rotary_embedding(q_TNH, k_TKH, sin_T1h, cos_T1h, head_size, True)
        pools = (self._of_kernel(pool) for pool in (cache.k_BKPH, cache.v_BKPH))
        self._pages.reshape_and_cache_flash(k_TKH, v_TKH.contiguous(), *pools, layout.slots_T)
        return q_TNH

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """See `Backend.attend`."""
        # It divides by the number of tokens, and a window of 1 means none to it.
        if not q_TNH.shape[0] or window == 1 or not self._attends(cache):
            return super().attend(q_TNH, cache, layout, window)
        plan = self._plan_of(layout)
        out_TNH = torch.empty_like(q_TNH)
        self._pages.flash_attn_varlen_func(
            out_TNH,
            q_TNH.contiguous(),
            self._of_kernel(cache.k_BKPH),
            self._of_kernel(cache.v_BKPH),
            layout.query_start_S1,
            plan.context_start_S1,
            plan.longest_query,
            plan.longest_context,
            q_TNH.shape[-1] ** -0.5,
            True,  # causal: a token sees what comes before it
            layout.block_tables_SM,
            None,  # no biases that depend on distance
            window_size_left=-1 if window is None else window - 1,  # beside the token itself
            window_size_right=-1 if window is None else 0,
        )
        return out_TNH

    def _plan_of(self, layout: StepLayout) -> _Plan:
        if self._plan is None or self._plan.layout is not layout:
            sums_S = layout.context_lens_S.cumsum(0, dtype=torch.int32)
            longest_query = max(end - start for start, end in pairwise(layout.query_start))
            self._plan = _Plan(
                layout, F.pad(sums_S, (1, 0)), longest_query, max(layout.context_lens)
            )
        return self._plan

    def _attends(self, cache: LayerCache) -> bool:
        """Whether its attention takes such a cache."""
        return True

    def _angles(self, cos_sin_TH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, H/2] each, in the dtype that it rotates with."""
        cos_T1h, sin_T1h = cos_sin_TH[:, None].chunk(2, dim=-1)
        return cos_T1h, sin_T1h

    def _of_kernel(self, pool_BKPH: Tensor) -> Tensor:
        """A pool in the order of dimensions that it takes."""
        return pool_BKPH


class IpexXpuBackend(XpuDevice, IpexBackend):
    """The build for GPUs: positions come before heads, half precision alone is attended."""

    name = "ipex"

    def new_cache(self, shape: CacheShape, num_blocks: int) -> list[LayerCache]:
        """See `Backend.new_cache`. Views of [B, P, K, H], which is how it lies in memory."""
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_size)

        def pool() -> Tensor:
            return torch.empty(size, dtype=shape.dtype, device=self.device).transpose(1, 2)

        return [LayerCache(pool(), pool()) for _ in range(shape.num_layers)]

    def _of_kernel(self, pool_BKPH: Tensor) -> Tensor:
        return pool_BKPH.transpose(1, 2)

    def _attends(self, cache: LayerCache) -> bool:
        pool_BKPH = cache.k_BKPH  # as Intel's own tests have it
        return pool_BKPH.dtype.itemsize == 2 and pool_BKPH.shape[2] % POSITIONS == 0

    def _angles(self, cos_sin_TH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return super()._angles(cos_sin_TH.to(dtype), dtype)
