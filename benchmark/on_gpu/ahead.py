"""Runs steps as a shard does, each launched before the one before it is read, and times them by the
device's own clock."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tessera.proto import shard_pb2
from tessera.shard.engine import Engine
from tessera.shard.launched import Launched


@dataclass(frozen=True, slots=True)
class Took:
    """Nanoseconds of the device, of the timed steps and of what lies between two in a row."""

    steps: list[int]  # from a step's first work to its tokens on the host
    periods: list[int]  # from the start of one to the start of the next
    idle: list[int]  # from the end of one to the start of the next


def run_ahead(engine: Engine, steps: Iterable[tuple[shard_pb2.Step, bool]]) -> Took:
    """Run steps, of which those with True are timed.

    Raises:
        RuntimeError: a sequence failed, so the times say nothing.
    """
    backend = engine.placement.backend
    under_way: Launched | None = None
    spans: list[tuple[Any, Any, bool]] = []  # marks of start and end, and whether it is timed

    def finish(launched: Launched) -> Any:
        reply = engine.finish(launched)
        if reply.failures:
            raise RuntimeError(f"a step failed: {reply.failures[0].message}")
        return launched.done or backend.mark()

    ends: list[Any] = []
    for step, is_timed in steps:
        if under_way is not None and not under_way.may_be_followed:
            ends.append(finish(under_way))
            under_way = None
        following = engine.launch(step)
        spans.append((following.started, None, is_timed))
        if under_way is not None:
            ends.append(finish(under_way))
        under_way = following
    if under_way is not None:
        ends.append(finish(under_way))
    took = Took([], [], [])
    marks = [(start, end, timed) for (start, _, timed), end in zip(spans, ends, strict=True)]
    took.steps.extend(backend.elapsed_ns(start, end) for start, end, timed in marks if timed)
    for (start, end, timed), (next_start, _, next_timed) in pairwise(marks):
        if timed and next_timed:
            took.periods.append(backend.elapsed_ns(start, next_start))
            took.idle.append(max(0, backend.elapsed_ns(end, next_start)))
    return took
