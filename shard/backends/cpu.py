"""CPUs: own C++ kernels for attention, quantised weights and the small operations, oneDNN for
other linear layers.

The kernels are built by `build.py` and chosen by the processor's instruction set.
"""

import logging
from functools import cached_property

import torch
from torch import Tensor

from tessera.shard.backends.base import CacheShape, LayerCache, Linear, StepLayout
from tessera.shard.backends.build import library_path
from tessera.shard.backends.huge_pages import HugePages, empty_on_huge_pages
from tessera.shard.backends.packed_linear import PackedLinear, packing_works
from tessera.shard.backends.paired_cache import can_be_paired, paired_sizes
from tessera.shard.backends.paired_linear import PairedLinear
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.quantized import QuantizedWeight, pack

logger = logging.getLogger(__name__)

# Weights with fewer elements stay as they are: calling the packed product costs 10 us more.
MIN_PACKED_ELEMENTS = {torch.float32: 512 * 256, torch.bfloat16: 128 * 128}


def available() -> bool:
    """There is always a CPU."""
    return True


def create(device: torch.device) -> ReferenceBackend:
    """The backend of this host's processors; the reference where the kernels are not built."""
    try:
        return CpuBackend(device)
    except OSError as reason:
        logger.warning(
            "CPU kernels cannot be used (%s): computing with the slower reference operations. "
            "Build the kernels with: python -m tessera.shard.backends.build",
            reason,
        )
        return ReferenceBackend(device)


def kernel_variants() -> list[str]:
    """Instruction sets of the built kernels that this processor has, the best first.

    Raises:
        OSError: the kernels are not built for these sources and this torch, or do not load.
    """
    library = library_path()
    if not library.exists():
        raise FileNotFoundError(f"{library.name} is not there")
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    names: list[str] = torch.ops.tessera_cpu.variants()
    return names


class CpuBackend(ReferenceBackend):
    """See `Backend`. float32 and bfloat16; head sizes that are multiples of 8."""

    name = "cpu"

    def __init__(self, device: torch.device, variant: str | None = None) -> None:
        """Choose the kernels: `variant` of `kernel_variants()`, or the best.

        Raises:
            OSError: see `kernel_variants`.
        """
        super().__init__(device)
        variants = kernel_variants()
        self.variant = variant or variants[0]
        self._variant = variants.index(self.variant)
        kernels = torch.ops.tessera_cpu
        self._pairs = kernels.paired_linear_pays(self._variant)
        self.pairs_work: bool = kernels.pairs_work(self._variant)  # for a cache
        self._weights = HugePages()
        self._add_rms_norm = kernels.add_rms_norm.default
        self._silu_mul = kernels.silu_mul.default
        self._survey = kernels.survey.default
        self._rotate_and_store = kernels.rotate_and_store.default
        self._attend = kernels.attend.default
        self._attend_dense = kernels.attend_dense.default

    def new_cache(self, shape: CacheShape, num_blocks: int) -> list[LayerCache]:
        """See `Backend.new_cache`; in pairs (`paired_cache`) where the kernels multiply those."""
        if self.pairs_work and can_be_paired(shape):
            keys, values = paired_sizes(shape, num_blocks)
        else:
            keys = values = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_size)
        return [
            LayerCache(
                empty_on_huge_pages(keys, shape.dtype), empty_on_huge_pages(values, shape.dtype)
            )
            for _ in range(shape.num_layers)
        ]

    @cached_property
    def _packable(self) -> dict[torch.dtype, bool]:
        return {dtype: packing_works(dtype) for dtype in MIN_PACKED_ELEMENTS}

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        """See `Backend.linear`. Packs large weights: the copy needs as much memory again."""
        dtype = weight_OI.dtype
        large = weight_OI.numel() >= MIN_PACKED_ELEMENTS.get(dtype, 0)
        if large and self._pairs and dtype == torch.bfloat16 and weight_OI.shape[1] % 2 == 0:
            return PairedLinear(weight_OI, bias_O, self._variant, self._weights)
        if large and self._packable.get(dtype, False):
            return PackedLinear(weight_OI, bias_O)
        return super().linear(weight_OI, bias_O)

    def quantized_linear(self, weight: QuantizedWeight, bias_O: Tensor | None) -> Linear:
        """See `Backend.quantized_linear`. Multiplies integers: the input is rounded too.

        A row's result has the same bits whatever other rows are there.
        """
        return QuantizedLinear(weight, bias_O, self._variant, self._weights)

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.add_rms_norm`. The sum overwrites `residual_TD`."""
        normed_TD = self._add_rms_norm(x_TD, residual_TD, weight_D, eps, self._variant)
        return normed_TD, x_TD.contiguous() if residual_TD is None else residual_TD

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """See `Backend.silu_mul`. Rounded once, where the reference rounds twice."""
        out: Tensor = self._silu_mul(gate_up_TF, self._variant)
        return out

    def survey(self, logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.survey`."""
        ids_R, log_sums_R, finite_R = self._survey(logits_RV, self._variant)
        return ids_R, log_sums_R, finite_R

    def rotate_and_store(
        self, qkv_TF: Tensor, cos_sin_LH: Tensor, cache: LayerCache, layout: StepLayout
    ) -> Tensor:
        """See `Backend.rotate_and_store`."""
        q_TNH: Tensor = self._rotate_and_store(
            qkv_TF,
            cos_sin_LH,
            cache.k_BKPH,
            cache.v_BKPH,
            layout.positions_T,
            layout.slots_T,
            self._variant,
        )
        return q_TNH

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """See `Backend.attend`.

        A token's result has the same bits whatever else is in the step, however its prompt was
        cut into chunks, and on any number of threads.
        """
        out_TNH: Tensor = self._attend(
            q_TNH,
            cache.k_BKPH,
            cache.v_BKPH,
            layout.query_start_S1,
            layout.context_lens_S,
            layout.block_tables_SM,
            window or 0,
            self._variant,
        )
        return out_TNH

    def attend_dense(self, q_SQNH: Tensor, k_SQNH: Tensor, v_SQNH: Tensor) -> Tensor:
        """See `Backend.attend_dense`: the same kernel, each row a sequence in one block."""
        out_SQNH: Tensor = self._attend_dense(q_SQNH, k_SQNH, v_SQNH, self._variant)
        return out_SQNH


class QuantizedLinear:
    """The kernels' product with weights of few bits, in the layout of `quantized.pack`."""

    def __init__(
        self, weight: QuantizedWeight, bias_O: Tensor | None, variant: int, memory: HugePages
    ) -> None:
        packed = pack(weight)
        self.packed = memory.empty(tuple(packed.shape), torch.uint8).copy_(packed)
        self.bias_O = bias_O
        self._out_features, self._bits, self._variant = weight.shape[0], weight.bits, variant
        self._multiply = torch.ops.tessera_cpu.quantized_linear.default

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        out_TO: Tensor = self._multiply(
            x_TI, self.packed, self.bias_O, self._out_features, self._bits, self._variant
        )
        return out_TO
