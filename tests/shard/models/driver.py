"""Runs a model directly: sequences, blocks and layouts without router, messages or engine."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tessera.shard.backends import load_backend
from tessera.shard.backends.base import Backend, CacheShape, StepLayout
from tessera.shard.backends.xpu import XpuBackend
from tessera.shard.batch import last_rows
from tessera.shard.models import load_model
from tessera.shard.models.base import ImageTiles, Placement
from tessera.shard.parallel import Group
from tests.shard.backends.simulated_device import simulated_device

T = TypeVar("T")

BLOCK_SIZE = 16
NUM_BLOCKS = 512


@dataclass
class Prompt:
    """Token ids with one placeholder per image feature, and the images in order."""

    ids: list[int]
    images: list[ImageTiles] = field(default_factory=list)
    image_token: int = -1


@dataclass
class LiveSequence:
    """A prompt in flight: what it will be fed, how much of it the cache holds."""

    prompt: Prompt
    ids: list[int]
    blocks: list[int]
    features: Tensor | None
    length: int = 0


class Runner:
    """A model with a cache of its own; every call is one or more steps of it."""

    def __init__(self, folder: Path, placement: Placement) -> None:
        self.placement = placement
        self.model = load_model(folder, placement)
        model = self.model
        kept = placement.cache_dtype or placement.dtype
        shape = CacheShape(model.num_layers, model.num_kv_heads, model.head_size, BLOCK_SIZE, kept)
        self.caches = placement.backend.new_cache(shape, NUM_BLOCKS)
        for cache in self.caches:  # what a block held before must never matter
            cache.k_BKPH.fill_(float("nan"))
            cache.v_BKPH.fill_(float("nan"))
        # Blocks are handed out in no useful order, as after hours of traffic.
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5))
        self._free: list[int] = order.tolist()

    def start(self, prompt: Prompt, room: int = 0) -> LiveSequence:
        """A sequence with blocks for its prompt and `room` more tokens; encodes its images."""
        count = -(-(len(prompt.ids) + room) // BLOCK_SIZE)
        blocks = [self._free.pop() for _ in range(count)]
        features = None
        if prompt.images:
            features = torch.cat(self.model.encode_images(prompt.images))
            assert features.shape[0] == prompt.ids.count(prompt.image_token)
        return LiveSequence(prompt, list(prompt.ids), blocks, features)

    def end(self, sequence: LiveSequence) -> None:
        """Give the blocks back."""
        self._free.extend(sequence.blocks)

    def step(
        self, work: Sequence[tuple[LiveSequence, int]], last_only: bool = False
    ) -> list[Tensor]:
        """Compute the next tokens of each sequence; hidden states [tokens, D] of each.

        With `last_only`, of each the last one, and anything in the places of the others.
        """
        ids = [s.ids[s.length : s.length + count] for s, count in work]
        layout = self._layout(work)
        x_TD = self.model.embed(self._tensor([i for part in ids for i in part], torch.int64))
        for (sequence, count), first in zip(work, layout.query_start, strict=False):
            self._splice(x_TD[first : first + count], sequence, count)
        wanted = last_rows(layout) if last_only else None
        hidden_TD = self.model.forward(x_TD, self.caches, layout, wanted)
        for sequence, count in work:
            sequence.length += count
        return list(torch.split(hidden_TD, [count for _, count in work]))

    def _splice(self, x_TD: Tensor, sequence: LiveSequence, count: int) -> None:
        if sequence.features is None:
            return
        ids = torch.tensor(sequence.ids[: sequence.length + count])
        is_image = ids == sequence.prompt.image_token
        # Generated ids may equal the placeholder; they are no images.
        is_image[len(sequence.prompt.ids) :] = False
        before = int(is_image[: sequence.length].sum())
        here = is_image[sequence.length :]
        wanted = sequence.features[before : before + int(here.sum())]
        x_TD[here.to(x_TD.device)] = wanted.to(x_TD.dtype)

    def _layout(self, work: Sequence[tuple[LiveSequence, int]]) -> StepLayout:
        positions, slots, starts, contexts = [], [], [0], []
        for sequence, count in work:
            for position in range(sequence.length, sequence.length + count):
                block = sequence.blocks[position // BLOCK_SIZE]
                positions.append(position)
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            starts.append(starts[-1] + count)
            contexts.append(sequence.length + count)
        most = max(len(sequence.blocks) for sequence, _ in work)
        tables = [s.blocks + [0] * (most - len(s.blocks)) for s, _ in work]
        return StepLayout(
            positions_T=self._tensor(positions, torch.int64),
            slots_T=self._tensor(slots, torch.int64),
            query_start_S1=self._tensor(starts, torch.int32),
            context_lens_S=self._tensor(contexts, torch.int32),
            block_tables_SM=self._tensor(tables, torch.int32),
            query_start=tuple(starts),
            context_lens=tuple(contexts),
        )

    def _tensor(self, values: object, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.placement.backend.device)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, chunk: int = 10**9, first_chunk: int | None = None) -> Tensor:
        """Logits [tokens, V] at every position of a prompt computed in chunks; empty off rank 0."""
        sequence = self.start(prompt)
        hidden = []
        count = chunk if first_chunk is None else first_chunk
        while sequence.length < len(prompt.ids):
            count = min(count, len(prompt.ids) - sequence.length)
            hidden += self.step([(sequence, count)])
            count = chunk
        self.end(sequence)
        return self._head(torch.cat(hidden))

    @torch.inference_mode()
    def batch_logits(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Logits at every position of several prompts that are computed in one step."""
        sequences = [self.start(prompt) for prompt in prompts]
        hidden = self.step([(s, len(s.ids)) for s in sequences])
        for sequence in sequences:
            self.end(sequence)
        return [self._head(part) for part in hidden]

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
        """`count` greedy ids for each prompt. A prompt joins one step after the one before it, so
        steps mix prefill with decoding."""
        waiting = list(prompts)
        running: list[LiveSequence] = []
        done: list[LiveSequence] = []
        while waiting or running:
            if waiting:
                running.append(self.start(waiting.pop(0), room=count))
            work = [(s, len(s.ids) - s.length) for s in running]
            last_RD = torch.stack([hidden[-1] for hidden in self.step(work, last_only=True)])
            for sequence, token in zip(running, self._argmax(last_RD), strict=True):
                sequence.ids.append(token)
            done += [s for s in running if len(s.ids) == len(s.prompt.ids) + count]
            running = [s for s in running if len(s.ids) < len(s.prompt.ids) + count]
        for sequence in done:
            self.end(sequence)
        in_order = sorted(done, key=lambda s: [p is s.prompt for p in prompts].index(True))
        return [s.ids[len(s.prompt.ids) :] for s in in_order]

    def _head(self, hidden_RD: Tensor) -> Tensor:
        logits = self.model.logits(hidden_RD)
        return torch.empty(0) if logits is None else logits.cpu()

    def _argmax(self, hidden_RD: Tensor) -> list[int]:
        logits = self.model.logits(hidden_RD)
        ids_R = torch.zeros(hidden_RD.shape[0], dtype=torch.int64)
        if logits is not None:
            ids_R = logits.argmax(-1).cpu()
        return self.placement.group.broadcast(ids_R).tolist()


def placement(
    backend: str = "reference", dtype: torch.dtype = torch.float32, group: Group | None = None
) -> Placement:
    """One rank on the device that `backend` needs; xpu's is simulated."""
    if backend == "xpu":
        operations: Backend = XpuBackend(simulated_device().device)
    else:
        operations = load_backend("cuda" if backend == "cuda" else "cpu", backend)
    return Placement(operations, group or Group(), dtype)


class _Meeting:
    """Where the ranks of a `ThreadGroup` exchange tensors."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.tensors: dict[int, Tensor] = {}


class ThreadGroup(Group):
    """Ranks as threads of this process: the collectives' meaning without their cost."""

    def __init__(self, rank: int, world_size: int, meeting: _Meeting) -> None:
        super().__init__(rank, world_size)
        self._meeting = meeting

    def _all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._meet(x)).sum(0))

    def _gather(self, x: Tensor) -> list[Tensor] | None:
        tensors = self._meet(x)
        return tensors if self.rank == 0 else None

    def _broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._meet(x)[0])

    def _meet(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor as it was on entry."""
        self._meeting.tensors[self.rank] = x.clone()
        self._meeting.barrier.wait()
        tensors = [self._meeting.tensors[rank] for rank in range(self.world_size)]
        self._meeting.barrier.wait()
        return tensors


def on_ranks(world_size: int, work: Callable[[Group], T]) -> list[T]:
    """Run `work` once per rank, each in a thread; the results in order of rank."""
    meeting = _Meeting(world_size)

    def one(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, world_size, meeting))
        except BaseException:
            meeting.barrier.abort()  # the others must not wait for this rank
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(one, rank) for rank in range(world_size)]
        errors = [e for e in (f.exception() for f in futures) if e is not None]
        broken = threading.BrokenBarrierError
        for error in sorted(errors, key=lambda e: isinstance(e.__cause__ or e, broken)):
            raise error
        return [future.result() for future in futures]
