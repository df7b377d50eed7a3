"""Decode steps that the device repeats from a recording: a GPU computes a step of a few sequences
faster than a host can name its operations.

One recording for each of some batch sizes; a step takes the next larger one. All read the same
tensors, which hold the step's rows, then rows of no sequence: their keys and values go to the
scratch block, and they see nothing.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.shard.backends.base import Backend, LayerCache, Recording, StepLayout
from tessera.shard.batch import Batch
from tessera.shard.kv_cache import SCRATCH_BLOCK
from tessera.shard.models.base import Model

logger = logging.getLogger(__name__)


LARGEST_BATCH = 256  # beyond it naming the operations takes less time than computing them


def batch_sizes(max_batch: int) -> list[int]:
    """The sizes to record for steps of up to `max_batch` sequences, ascending, the largest last.

    Steps are filled up with few rows of nothing; the number of recordings stays below 30.
    """
    largest = min(max_batch, LARGEST_BATCH)
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, LARGEST_BATCH + 1, 16)]
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """Recordings of a model's decode step over one cache; one rank only."""

    def __init__(self, backend: Backend, model: Model, max_batch: int, max_blocks: int) -> None:
        """Room for `max_batch` rows with `max_blocks` blocks each. Nothing is recorded yet."""
        device = backend.device

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._backend, self._model = backend, model
        self._ids_T = zeros(max_batch, dtype=torch.int64)
        self._positions_T = zeros(max_batch, dtype=torch.int64)
        self._slots_T = zeros(max_batch, dtype=torch.int64)
        self._context_lens_S = zeros(max_batch, dtype=torch.int32)
        self._tables_SM = zeros(max_batch, max_blocks, dtype=torch.int32)
        self._query_start_S1 = torch.arange(max_batch + 1, dtype=torch.int32, device=device)
        self._hidden_TD: Tensor | None = None  # of the largest recording, the first
        self._sizes: list[int] = []
        self._recordings: list[Recording] = []

    @classmethod
    def recorded(
        cls,
        backend: Backend,
        model: Model,
        caches: list[LayerCache],
        sizes: Sequence[int],
        max_blocks: int,
    ) -> "DecodeGraphs | None":
        """Recordings for batches of these sizes, or None where there can be none."""
        graphs = cls(backend, model, max(sizes), max_blocks)
        try:
            with torch.inference_mode():
                is_recorded = graphs._record(caches, sizes)
        except RuntimeError:
            logger.warning("decode steps cannot be recorded; every one is launched", exc_info=True)
            return None
        return graphs if is_recorded else None

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, that the recordings and their tensors hold."""
        tensors = (self._tables_SM, self._hidden_TD)
        return sum(recording.num_bytes for recording in self._recordings) + sum(
            tensor.nbytes for tensor in tensors if tensor is not None
        )

    def hidden_states(self, batch: Batch) -> Tensor | None:
        """The model's output [T, D], valid until the next step; None if it has to be launched."""
        if not batch.is_decode or batch.num_tokens > max(self._sizes):
            return None
        if batch.layout.block_tables_SM.shape[1] > self._tables_SM.shape[1]:
            return None
        assert self._hidden_TD is not None
        number = bisect_left(self._sizes, batch.num_tokens)
        self._fill(batch, self._sizes[number])
        self._recordings[number].replay()
        return self._hidden_TD[: batch.num_tokens]

    def _record(self, caches: list[LayerCache], sizes: Sequence[int]) -> bool:
        """From the largest on, so that the memory of one is enough for the next."""
        recording: Recording | None = None
        for size in sorted(set(sizes), reverse=True):
            layout = self._layout(size)

            def work(size: int = size, layout: StepLayout = layout) -> None:
                x_TD = self._model.embed(self._ids_T[:size])
                hidden_TD = self._model.forward(x_TD, caches, layout)
                if self._hidden_TD is None:
                    self._hidden_TD = torch.empty_like(hidden_TD)
                self._hidden_TD[:size] = hidden_TD

            recording = self._backend.record(work, recording)
            if recording is None:
                return False
            self._sizes.insert(0, size)
            self._recordings.insert(0, recording)
        return True

    def _layout(self, size: int) -> StepLayout:
        return StepLayout(
            positions_T=self._positions_T[:size],
            slots_T=self._slots_T[:size],
            query_start_S1=self._query_start_S1[: size + 1],
            context_lens_S=self._context_lens_S[:size],
            block_tables_SM=self._tables_SM[:size],
            query_start=tuple(range(size + 1)),
            context_lens=(1,) * size,  # any: a recording does not depend on lengths
        )

    def _fill(self, batch: Batch, size: int) -> None:
        """The step's rows, and rows of no sequence up to `size`."""
        rows, layout = batch.num_tokens, batch.layout
        self._ids_T[:rows].copy_(batch.ids_T)
        self._positions_T[:rows].copy_(layout.positions_T)
        self._slots_T[:rows].copy_(layout.slots_T)
        self._context_lens_S[:rows].copy_(layout.context_lens_S)
        self._tables_SM[:rows, : layout.block_tables_SM.shape[1]].copy_(layout.block_tables_SM)
        if rows < size:
            self._slots_T[rows:size] = SCRATCH_BLOCK  # the first slot of that block
            self._context_lens_S[rows:size] = 0
