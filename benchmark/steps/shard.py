"""A shard without its process: a loaded model and the engine that runs steps on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmark.kernels import Bench
from benchmark.steps.cases import BLOCK_SIZE
from benchmark.steps.work import Sizes, sizes_of
from tessera.proto import shard_pb2
from tessera.shard import token_choice
from tessera.shard.backends import load_backend
from tessera.shard.engine import Engine
from tessera.shard.models import load_model, resolve_cache_dtype, resolve_dtype
from tessera.shard.models.base import Model, Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group
from tessera.shard.quantization_names import quantization
from tessera.shard.sampler import choose


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one step, from its message's bytes to the reply's bytes."""

    total_s: float  # by the shard's clock
    wall_s: float
    needed_s: float  # of `wall_s`, inside the model and the sampler


class Stopwatch:
    """Adds up the time spent in some functions.

    It is the time that passes: asking for processor time is a call of the system, and so many of
    them would be noticed beside what is between the functions.
    """

    def __init__(self) -> None:
        self.total_s = 0.0

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self.total_s += time.perf_counter() - start

        return run


class WatchedModel:
    """A model whose computations are timed."""

    def __init__(self, model: Model, watch: Stopwatch) -> None:
        self._model = model
        self.embed = watch.timed(model.embed)
        self.encode_images = watch.timed(model.encode_images)
        self.forward = watch.timed(model.forward)
        self.logits = watch.timed(model.logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Shard:
    """One rank. A step's time is processor time on one CPU thread of one rank, else wall time."""

    def __init__(
        self,
        folder: Path,
        device: str,
        num_blocks: int,
        rank: int = 0,
        ranks: int = 1,
        meeting: str = "",
        quantize: str = "",
        kv_cache_dtype: str = "auto",
    ) -> None:
        """Load it.

        Args:
            meeting: where ranks find each other, as `Group.connect` takes it.
            quantize: as the setting QUANTIZE.
            kv_cache_dtype: as the setting KV_CACHE_DTYPE.
        """
        config = read_config(folder)
        backend = load_backend(device, "auto")
        dtype = resolve_dtype("auto", config, backend.device.type)
        group = Group.connect(rank, ranks, backend.device, meeting)
        cache_dtype = resolve_cache_dtype(kv_cache_dtype, backend)
        placement = Placement(backend, group, dtype, quantization(quantize), cache_dtype)
        model = load_model(folder, placement)
        self.limits = Bench(backend, dtype, 0.0)
        if ranks > 1:  # waiting for the others is part of a step
            self.limits.clock = time.perf_counter
        self.sizes: Sizes = sizes_of(model, config, dtype.itemsize, ranks)  # type: ignore[arg-type]
        self.tile = config.get("vision_config", {}).get("image_size", 0)
        self._watch = Stopwatch()
        self.engine = Engine(WatchedModel(model, self._watch), placement, BLOCK_SIZE)
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
        self._watch.total_s = 0.0
        watched = patch.object(token_choice, "choose", self._watch.timed(choose))
        with watched, torch.inference_mode():  # which a shard enters once for all its steps
            start, wall = self.limits.clock(), time.perf_counter()
            reply = self.engine.run(shard_pb2.Step.FromString(sent))
            reply.SerializeToString()
            wall_s, total_s = time.perf_counter() - wall, self.limits.clock() - start
        if reply.failures:
            raise RuntimeError(f"a step failed: {reply.failures[0].message}")
        return Took(total_s, wall_s, self._watch.total_s)
