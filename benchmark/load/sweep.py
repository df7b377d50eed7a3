"""The highest rate at which enough requests keep the objective."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmark.load.measure import Summary


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate that was tried."""

    per_s: float
    summary: Summary
    is_met: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found. `best_per_s`: None if even the lowest rate was too much."""

    best_per_s: float | None
    trials: tuple[Trial, ...]


async def sweep(
    run: Callable[[float], Awaitable[Summary]],
    start_per_s: float,
    *,
    least_share: float = 0.95,
    precision: float = 0.1,
    max_trials: int = 12,
) -> Sweep:
    """Double or halve the rate until the limit lies between two, then bisect.

    Args:
        run: measures one rate, requests per second.
        start_per_s: the first rate, above 0.
        least_share: of the requests that must be good.
        precision: ends when the rate too high is at most this much above the one that is met,
            as a share of it.
        max_trials: rates tried in all, 1 or more.
    """
    trials: list[Trial] = []
    met, missed = 0.0, float("inf")
    rate = start_per_s
    while len(trials) < max_trials and not (met and missed <= met * (1 + precision)):
        summary = await run(rate)
        trial = Trial(rate, summary, summary.good_share >= least_share)
        trials.append(trial)
        if trial.is_met:
            met = rate
        else:
            missed = rate
        rate = _next_rate(met, missed)
    return Sweep(met or None, tuple(trials))


def _next_rate(met: float, missed: float) -> float:
    if missed == float("inf"):
        return met * 2
    return (met + missed) / 2  # halves it while nothing has been met
