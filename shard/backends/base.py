"""What a device must offer. One file in shard/backends/ per device; nothing else names a device.

Shape letters, used as name suffixes in this package:
    T tokens of this step, packed over sequences     S sequences of this step
    N query heads on this rank                       K key/value heads on this rank
    H size of one head                               B blocks in the pool
    P positions in one block ("block size")          M most blocks any sequence here has
    D width of the residual stream                   I, O inputs and outputs of a linear
    F features of a fused projection                 V vocabulary (on this rank, if split)
    L positions of the rotary tables                 R rows that are sampled
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tessera.shard.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of the KV cache of one model on one rank."""

    num_layers: int
    num_kv_heads: int  # on this rank
    head_size: int
    block_size: int
    dtype: torch.dtype  # the model's, or one of 8 bits

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_position = self.num_kv_heads * self.head_size * self.dtype.itemsize
        return 2 * self.num_layers * self.block_size * per_position


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer for every block of the pool: [B, K, P, H] each.

    Heads before positions, so that one head's keys of a block lie together in memory. A backend may
    lay them out otherwise in caches of its own (`paired_cache`), blocks first. In 8 bits
    (float8_e4m3fn, float8_e5m2) a number too large for the format is its largest, and one that is
    not finite is NaN.
    """

    k_BKPH: Tensor
    v_BKPH: Tensor


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where this step's tokens sit: in the packed inputs and in the paged cache.

    Integer tensors live on the backend's device; the tuples repeat on the host what the plain
    loops need, so that no backend has to copy from the device.
    """

    positions_T: Tensor  # int64, position of each token in its sequence
    slots_T: Tensor  # int64, block * block_size + offset each token's key and value go to
    query_start_S1: Tensor  # int32, S + 1 offsets into T; pure decode is 0, 1, 2, ...
    context_lens_S: Tensor  # int32, tokens each sequence can see, this step's included
    block_tables_SM: Tensor  # int32, block ids in order; past a sequence's end: 0
    query_start: tuple[int, ...]
    context_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LastRows:
    """The last new token of each sequence of a step, as a step of its own over the same cache."""

    rows_S: Tensor  # int64, their rows among the step's tokens
    layout: StepLayout


class Linear(Protocol):
    """A matrix multiplication whose weight the backend has laid out for itself."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """x_TI @ weight.T + bias, shape [T, O], dtype of the input."""
        ...


class Recording(Protocol):
    """Work that a device can do again without being told every operation."""

    num_bytes: int  # of the device's memory that it holds

    def replay(self) -> None:
        """Do it again, on the same tensors with whatever they hold now."""
        ...


class Backend(Protocol):
    """The operations the models are made of. Dtypes: float32, bfloat16 (and float16 on GPUs)."""

    name: str
    device: torch.device
    runs_ahead: bool  # whether operations return before they are done

    @property
    def float8_cache(self) -> bool:
        """Whether a cache may be in 8 bits."""
        ...

    def new_cache(self, shape: CacheShape, num_blocks: int) -> list[LayerCache]:
        """One `LayerCache` per layer for `num_blocks` blocks; contents undefined."""
        ...

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        """Prepare a weight once, at load time. The caller drops its own reference afterwards."""
        ...

    def quantized_linear(self, weight: QuantizedWeight, bias_O: Tensor | None) -> Linear:
        """As `linear`, for a weight that stays in few bits.

        A backend may round the input too, to 8 bits per group of 32 columns of each row. What is
        not finite makes its own row NaN.
        """
        ...

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual) * weight, x + residual).

        The second is the new residual stream; it may reuse the memory of `residual_TD`. The norm
        is computed in float32 (as `LlamaRMSNorm`: rounded to the dtype before the weight).
        """
        ...

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """silu(first half) * second half of the last dimension: [T, F / 2]."""
        ...

    def rotate_and_store(
        self,
        qkv_TF: Tensor,
        cos_sin_LH: Tensor,
        cache: LayerCache,
        layout: StepLayout,
    ) -> Tensor:
        """Rotate queries and keys by position, store keys and values, return q_TNH.

        Args:
            qkv_TF: [T, (N + 2K) * H], queries then keys then values.
            cos_sin_LH: float32; row p holds cos then sin (H/2 each) of position p's angles.
                Halves are rotated against each other ("neox" style, `rotate_half`).
        """
        ...

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """Attend from every new token to its own sequence, itself and earlier only.

        Scores are scaled by 1/sqrt(H). With `window`, a token at position p sees positions
        above p - window only. Returns out_TNH in the dtype of `q_TNH`.
        """
        ...

    def attend_dense(self, q_SQNH: Tensor, k_SQNH: Tensor, v_SQNH: Tensor) -> Tensor:
        """Full bidirectional attention inside each of S equally long rows (the vision tower).

        Q is the row length here. Returns [S, Q, N, H].
        """
        ...

    def survey(self, logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of float32 rows, see `survey.survey`. Waits for nothing."""
        ...

    def draw(self, scores_RV: Tensor, keys_R: Tensor) -> Tensor:
        """Token ids [R] drawn from softmax(scores), see `gumbel.draw`. Waits for nothing."""
        ...

    def free_memory_bytes(self) -> int:
        """Memory this process may still take on the device."""
        ...

    def used_memory_bytes(self) -> int:
        """Memory this process holds on the device now."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Highest memory in use since `reset_peak_memory`, or None where it is not measured."""
        ...

    def reset_peak_memory(self) -> None:
        """Start a new measurement for `peak_memory_bytes`."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        ...

    def mark(self) -> Any:
        """A point in the device's work, to be given to `elapsed_ns`. Waits for nothing."""
        ...

    def wait(self, mark: Any) -> None:
        """Until the device has reached a mark. From any thread."""
        ...

    def elapsed_ns(self, first: Any, last: Any) -> int:
        """Nanoseconds of the device between two marks; waits until it has reached the later."""
        ...

    def record(self, work: Callable[[], None], after: Recording | None) -> Recording | None:
        """Do `work` and record it, or return None where a device does not record.

        `work` reads and writes tensors that stay where they are, and does not depend on what is
        in them. `after` is a recording that never runs while this one does: they share memory.
        """
        ...
