"""A loaded model with a cache, and the kinds of step that are timed on it."""

import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.kernels import Bench
from benchmark.on_gpu.ahead import Took, run_ahead
from benchmark.on_gpu.ceilings import Ceilings
from benchmark.steps.cases import BLOCK_SIZE, Case, StepWriter
from benchmark.steps.work import Sizes, Work, sizes_of
from tessera.proto import shard_pb2
from tessera.shard.backends import load_backend
from tessera.shard.engine import Engine
from tessera.shard.models import load_model, resolve_dtype
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group

Row = dict[str, Any]
TILES = 5  # of a picture: the overview and two by two


@dataclass(frozen=True, slots=True)
class Timed:
    """A kind of step."""

    name: str
    work: Work
    seconds: float
    more: Row

    def row(self, limits: Ceilings) -> Row:
        """As it is reported, beside what the device allows."""
        rates = (limits.copied_bytes, limits.matrix_flops)
        limit_s = self.work.limit_s(*rates)
        return {
            "name": self.name,
            "ms": round(self.seconds * 1e3, 3),
            "limit_ms": round(limit_s * 1e3, 3),
            "share_of_limit": round(limit_s / self.seconds, 4),
            "bound": "memory" if self.work.is_memory_bound(*rates) else "arithmetic",
        } | self.more


class GpuShard:
    """One rank on one device, without its process."""

    def __init__(
        self, folder: Path, device: str, num_blocks: int, max_batch: int, max_context: int
    ) -> None:
        config = read_config(folder)
        backend = load_backend(device)
        self.dtype = resolve_dtype("auto", config, backend.device.type)
        placement = Placement(backend, Group(), self.dtype)
        model = load_model(folder, placement)
        self.bench = Bench(backend, self.dtype, 0.5)
        self.sizes: Sizes = sizes_of(model, config, self.dtype.itemsize, 1)  # type: ignore[arg-type]
        self.engine = Engine(model, placement, BLOCK_SIZE)
        self.engine.allocate_cache(num_blocks)
        for cache in self.engine.trial_caches(model.num_layers):
            cache.k_BKPH.fill_(0.02)  # what was not written may not be finite
            cache.v_BKPH.fill_(0.02)
        self.recorded_bytes = self.engine.record_decodes(max_batch, max_context)
        self._writer = StepWriter(num_blocks, config.get("vision_config", {}).get("image_size", 0))

    def decode(self, batch: int, context: int, rounds: int) -> Timed:
        """Decode steps in a row. A period is what a stream waits for its next token."""
        case = Case("decode", batch, context)
        took = self._run(self._rounds(case, rounds))
        period_s = statistics.median(took.periods) / 1e9
        more = {
            "batch": batch,
            "context": context,
            "tokens_per_s": round(batch / period_s, 1),
            "device_ms": round(statistics.median(took.steps) / 1e6, 3),
            "idle_share": round(statistics.median(took.idle) / 1e9 / period_s, 4),
        }
        return Timed(case.name, case.work(self.sizes), period_s, more)

    def prefill(self, tokens: int, rounds: int) -> Timed:
        """A whole prompt in one step."""
        case = Case("prefill", 1, tokens)
        took = self._run(self._rounds(case, rounds))
        seconds = statistics.median(took.steps) / 1e9
        more = {"tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
        return Timed(case.name, case.work(self.sizes), seconds, more)

    def pictures(self, count: int, rounds: int) -> Timed:
        """Pictures of `TILES` tiles encoded together."""
        took = self._run((self._pictures(count), True) for _ in range(rounds + 1))
        seconds = statistics.median(took.steps[1:]) / 1e9
        more = {"pictures": count, "pictures_per_s": round(count / seconds, 1)}
        name = f"{count} pictures of {TILES} tiles"
        return Timed(name, self.sizes.pictures(count * TILES), seconds, more)

    def _run(self, steps: Iterator[tuple[shard_pb2.Step, bool]]) -> Took:
        took = run_ahead(self.engine, steps)
        self.engine.run(self._writer.clear())
        return took

    def _rounds(self, case: Case, rounds: int) -> Iterator[tuple[shard_pb2.Step, bool]]:
        """The first round compiles and warms up."""
        for number in range(rounds + 1):
            for step, is_timed in self._writer.steps(case):
                yield step, is_timed and number > 0

    def _pictures(self, count: int) -> shard_pb2.Step:
        whole = shard_pb2.Step()
        for _ in range(count):
            for step, _is_timed in self._writer.steps(Case("pictures", tiles=TILES)):
                whole.MergeFrom(step)
        # One of the pictures was to be forgotten when the next came: they stay for this step.
        mine = {image.content_hash for image in whole.images}
        kept = [each for each in whole.released_images if each not in mine]
        del whole.released_images[:]
        whole.released_images.extend(kept)
        return whole


def free(device: torch.device) -> None:
    """Give the device's unused memory back, for others."""
    gc.collect()  # what is no longer used may still refer to itself
    if device.type != "cpu":
        torch.accelerator.empty_cache()
