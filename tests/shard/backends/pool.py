"""What the tests of backends share: sequences in a scattered cache, and where results must lie."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.shard.backends.base import Backend, CacheShape, LayerCache, StepLayout
from tessera.shard.backends.paired_cache import can_be_paired
from tessera.shard.backends.reference import ReferenceBackend

CPU = torch.device("cpu")
NAN = float("nan")
# Largest error relative to the largest expected value.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class HostFaced:
    """A backend of another device for tests whose tensors are all on the host.

    Arguments are copied there, results back, and what was written to a cache too.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backend, name)
        return self._faced(function) if callable(function) else function

    def _faced(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            there = [moved(argument, self._backend.device) for argument in arguments]
            result = function(*there)
            for ours, theirs in zip(arguments, there, strict=True):
                if isinstance(ours, LayerCache):
                    ours.k_BKPH.copy_(theirs.k_BKPH)
                    ours.v_BKPH.copy_(theirs.v_BKPH)
            return self._faced(result) if callable(result) else moved(result, CPU)

        return call


class InPairs(HostFaced):
    """The CPU backend for tests whose caches are not in pairs: they are for it."""

    def _faced(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            there = [
                paired(argument) if isinstance(argument, LayerCache) else argument
                for argument in arguments
            ]
            result = function(*there)
            for ours, theirs in zip(arguments, there, strict=True):
                if isinstance(ours, LayerCache) and theirs is not ours:
                    ours.k_BKPH.copy_(
                        theirs.k_BKPH.permute(0, 1, 2, 4, 3, 5).reshape_as(ours.k_BKPH)
                    )
                    ours.v_BKPH.copy_(
                        theirs.v_BKPH.permute(0, 1, 2, 3, 5, 4).reshape_as(ours.v_BKPH)
                    )
            return result

        return call


def paired(cache: LayerCache) -> LayerCache:
    """A copy in pairs (csrc/kernels.h); the cache itself where there can be none."""
    blocks, heads, positions, head_size = cache.k_BKPH.shape
    shape = CacheShape(1, heads, head_size, positions, cache.k_BKPH.dtype)
    if not can_be_paired(shape):
        return cache
    k_size = (blocks, heads, positions // 16, 16, head_size // 2, 2)
    v_size = (blocks, heads, positions // 16, 8, 2, head_size)
    return LayerCache(
        cache.k_BKPH.view(k_size).permute(0, 1, 2, 4, 3, 5).contiguous(),
        cache.v_BKPH.view(v_size).permute(0, 1, 2, 3, 5, 4).contiguous(),
    )


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or what holds tensors, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return type(value)(**parts)
    return value


@dataclass
class PooledSequence:
    """One sequence: everything it will ever see, and its blocks."""

    q_CNH: Tensor
    k_CKH: Tensor
    v_CKH: Tensor
    blocks: list[int]


class Pool:
    """Sequences in scattered blocks of a cache whose unused positions are NaN."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        seed: int = 0,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Keys and values are numbers that a cache of `cache_dtype` holds as they are."""
        kept = cache_dtype or dtype
        generator = torch.Generator().manual_seed(seed)
        self.num_heads, num_kv_heads, head_size = heads
        self.block_size = 16
        counts = [-(-length // self.block_size) for length in lengths]
        shape = CacheShape(1, num_kv_heads, head_size, self.block_size, kept)
        self.cache = ReferenceBackend(CPU).new_cache(shape, sum(counts) + 3)[0]
        self.cache.k_BKPH.fill_(NAN)
        self.cache.v_BKPH.fill_(NAN)
        blocks = torch.randperm(sum(counts) + 3, generator=generator).tolist()

        def normal(length: int, rows: int) -> Tensor:
            return torch.randn(length, rows, head_size, generator=generator).to(dtype)

        self.sequences = [
            PooledSequence(
                normal(length, self.num_heads),
                normal(length, num_kv_heads).to(kept).to(dtype),
                normal(length, num_kv_heads).to(kept).to(dtype),
                [blocks.pop() for _ in range(count)],
            )
            for length, count in zip(lengths, counts, strict=True)
        ]

    def layout(self, parts: Sequence[tuple[int, int, int]]) -> StepLayout:
        """The step that computes positions [first, last) of each (s, first, last)."""
        starts = [0]
        for _, first, last in parts:
            starts.append(starts[-1] + last - first)
        widest = max(len(self.sequences[s].blocks) for s, _, _ in parts)
        tables = torch.zeros(len(parts), widest, dtype=torch.int32)
        for row, (s, _, last) in enumerate(parts):
            used = self.sequences[s].blocks[: -(-last // self.block_size)]
            tables[row, : len(used)] = torch.tensor(used)
        positions = [p for _, first, last in parts for p in range(first, last)]
        slots = [
            self.sequences[s].blocks[p // self.block_size] * self.block_size + p % self.block_size
            for s, first, last in parts
            for p in range(first, last)
        ]
        context_lens = tuple(last for _, _, last in parts)
        return StepLayout(
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(context_lens, dtype=torch.int32),
            tables,
            tuple(starts),
            context_lens,
        )

    def fill(self, s: int, first: int, last: int) -> None:
        """Put keys and values of positions [first, last) into the cache."""
        sequence = self.sequences[s]
        for p in range(first, last):
            block, offset = sequence.blocks[p // self.block_size], p % self.block_size
            self.cache.k_BKPH[block, :, offset] = sequence.k_CKH[p]
            self.cache.v_BKPH[block, :, offset] = sequence.v_CKH[p]

    def step(
        self, backend: Backend, parts: Sequence[tuple[int, int, int]], window: int | None = None
    ) -> list[Tensor]:
        """The attention of one step, a tensor for each part."""
        for part in parts:
            self.fill(*part)
        q_TNH = torch.cat([self.sequences[s].q_CNH[first:last] for s, first, last in parts])
        out_TNH = backend.attend(q_TNH, self.cache, self.layout(parts), window)
        assert out_TNH.dtype == q_TNH.dtype
        return list(torch.split(out_TNH, [last - first for _, first, last in parts]))

    def expected(self, s: int, first: int, last: int, window: int | None = None) -> Tensor:
        """Dense attention of positions [first, last) in float64."""
        sequence = self.sequences[s]
        group = self.num_heads // sequence.k_CKH.shape[1]
        q, k, v = (x[:last].double() for x in (sequence.q_CNH, sequence.k_CKH, sequence.v_CKH))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qnh,cnh->nqc", q[first:], k) / q.shape[-1] ** 0.5
        query, key = torch.arange(first, last)[:, None], torch.arange(last)
        hidden = (key > query) | (key <= query - (window or last))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("nqc,cnh->qnh", weights, v)


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[got.dtype]  # also false for NaN


def stored_rows(cache: LayerCache, slots_T: Tensor) -> LayerCache:
    blocks, offsets = slots_T // 16, slots_T % 16
    return LayerCache(cache.k_BKPH[blocks, :, offsets], cache.v_BKPH[blocks, :, offsets])
