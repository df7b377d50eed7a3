"""A shard without its process: a loaded model and the engine that runs steps on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.kernels import Bench
from benchmark.steps.cases import BLOCK_SIZE
from benchmark.steps.work import Sizes, sizes_of
from tessera.proto import shard_pb2
from tessera.shard.backends import load_backend
from tessera.shard.backends.base import LayerCache, StepLayout
from tessera.shard.engine import Engine
from tessera.shard.models import load_model, resolve_dtype
from tessera.shard.models.base import ImageTiles, Model, Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group
from tessera.shard.sampler import SampleRow, sample

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one step, from its message's bytes to the reply's bytes."""

    total_s: float  # by the shard's clock
    model_s: float  # of that, inside the model
    wall_s: float


class TimedModel:
    """A model that adds up the time spent inside it."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self._model = model
        self._clock = clock
        self.inside_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed(self, ids_T: Tensor) -> Tensor:
        """See `Model.embed`."""
        return self._timed(lambda: self._model.embed(ids_T))

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        """See `Model.encode_images`."""
        return self._timed(lambda: self._model.encode_images(images))

    def forward(self, x_TD: Tensor, caches: list[LayerCache], layout: StepLayout) -> Tensor:
        """See `Model.forward`."""
        return self._timed(lambda: self._model.forward(x_TD, caches, layout))

    def logits(self, hidden_RD: Tensor) -> Tensor | None:
        """See `Model.logits`."""
        return self._timed(lambda: self._model.logits(hidden_RD))

    def _timed(self, work: Callable[[], Any]) -> Any:
        start = self._clock()
        result = work()
        self.inside_s += self._clock() - start
        return result


class Shard:
    """One rank. Times are processor time with one CPU thread and one rank, else wall time."""

    def __init__(
        self, folder: Path, device: str, num_blocks: int, rank: int, ranks: int, meeting: str
    ) -> None:
        """`meeting`: where ranks find each other, as `Group.connect` takes it."""
        config = read_config(folder)
        backend = load_backend(device, "auto")
        dtype = resolve_dtype("auto", config, backend.device.type)
        group = Group.connect(rank, ranks, backend.device, meeting)
        placement = Placement(backend, group, dtype)
        model = load_model(folder, placement)
        self.limits = Bench(backend, dtype, 0.0)
        if ranks > 1:  # waiting for the others is part of a step
            self.limits.clock = time.perf_counter
        self.sizes: Sizes = sizes_of(model, config, dtype.itemsize, ranks)  # type: ignore[arg-type]
        self.tile = config.get("vision_config", {}).get("image_size", 0)
        self.backend = backend
        self.model = TimedModel(model, self.limits.clock)
        self.engine = Engine(self.model, placement, BLOCK_SIZE)
        self.engine.allocate_cache(num_blocks)
        # Memory nobody has written to is one page of zeros, which caches hold.
        for cache in self.engine.trial_caches(model.num_layers):
            cache.k_BKPH.fill_(0.02)
            cache.v_BKPH.fill_(0.02)

    def run(self, step: shard_pb2.Step) -> Took:
        """Compute a step.

        Raises:
            RuntimeError: a sequence failed, so the time says nothing.
        """
        sent = step.SerializeToString()
        self.model.inside_s = 0.0
        wall, start = time.perf_counter(), self.limits.clock()
        reply = self.engine.run(shard_pb2.Step.FromString(sent))
        reply.SerializeToString()
        took = Took(
            self.limits.clock() - start, self.model.inside_s, time.perf_counter() - wall
        )
        if reply.failures:
            raise RuntimeError(f"a step failed: {reply.failures[0].message}")
        return took

    @torch.inference_mode()
    def sample_s(self, batch: int) -> float:
        """Seconds the sampler takes to choose the likeliest token of `batch` rows."""
        vocab_size: int = self.model.vocab_size
        logits_RV = torch.zeros(batch, vocab_size, device=self.backend.device)
        rows = [SampleRow(shard_pb2.SamplingParams(), [0], 1)] * batch
        return self.limits.best_s(lambda _: sample(logits_RV, rows))
