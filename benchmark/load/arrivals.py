"""When requests are sent: at a rate, or as soon as an earlier one is done."""

from collections.abc import Sequence
from random import Random


def poisson_times_s(rng: Random, per_s: float, count: int) -> list[float]:
    """Seconds from the start at which `count` independent clients arrive, `per_s` of them a second.

    Raises:
        ValueError: a rate that is not above 0.
    """
    if not per_s > 0:
        raise ValueError(f"a rate must be above 0, it is {per_s}")
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(per_s)
        times.append(now)
    return times


def dealt(count: int, hands: int) -> list[Sequence[int]]:
    """The numbers below `count`, dealt in turn to `hands` clients that send one after the other."""
    return [range(hand, count, hands) for hand in range(min(hands, count))]
