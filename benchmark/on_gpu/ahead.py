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


@dataclass(frozen=True, slots=True)
class _Span:
    """Marks of a step's start and end."""

    start: Any
    end: Any
    is_timed: bool


def run_ahead(engine: Engine, steps: Iterable[tuple[shard_pb2.Step, bool]]) -> Took:
    """Run steps, of which those with True are timed.

    Raises:
        RuntimeError: a sequence failed, so the times say nothing.
    """
    spans: list[_Span] = []
    under_way: tuple[Launched, bool] | None = None
    for step, is_timed in steps:
        if under_way is not None and not under_way[0].may_be_followed:
            spans.append(_finished(engine, *under_way))
            under_way = None
        following = engine.launch(step)
        if under_way is not None:
            spans.append(_finished(engine, *under_way))
        under_way = (following, is_timed)
    if under_way is not None:
        spans.append(_finished(engine, *under_way))
    between = engine.placement.backend.elapsed_ns
    in_a_row = [(a, b) for a, b in pairwise(spans) if a.is_timed and b.is_timed]
    return Took(
        steps=[between(span.start, span.end) for span in spans if span.is_timed],
        periods=[between(a.start, b.start) for a, b in in_a_row],
        idle=[max(0, between(a.end, b.start)) for a, b in in_a_row],
    )


def _finished(engine: Engine, launched: Launched, is_timed: bool) -> _Span:
    reply = engine.finish(launched)
    if reply.failures:
        raise RuntimeError(f"a step failed: {reply.failures[0].message}")
    end = engine.placement.backend.mark() if launched.done is None else launched.done
    return _Span(launched.started, end, is_timed)
