"""Medians of paired ratios, and how sure one can be of them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of ratios that were each taken within one round."""

    median: float
    low: float  # the interval that holds the true median ...
    high: float
    confidence: float  # ... with at least this probability
    rounds: int

    @property
    def is_decided(self) -> bool:
        """Whether one side was faster beyond chance: the interval leaves 1 out."""
        return self.confidence >= CONFIDENCE and not self.low <= 1.0 <= self.high


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of two series of which the n-th values were measured one after the other.

    The interval is made of order statistics: no distribution is assumed. Its confidence is below
    95 % with fewer than six rounds, for which it is the whole range.

    Raises:
        ValueError: the series are empty or differ in length, or a denominator is 0.
    """
    if not numerators or len(numerators) != len(denominators) or not all(denominators):
        raise ValueError("two series of equal length are needed, without a 0 to divide by")
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    left_out, confidence = _left_out(len(ratios))
    return Ratio(
        median=round(statistics.median(ratios), 4),
        low=round(ratios[left_out], 4),
        high=round(ratios[-1 - left_out], 4),
        confidence=round(confidence, 4),
        rounds=len(ratios),
    )


def _left_out(count: int) -> tuple[int, float]:
    """How many values at each end can be left out of the interval, and its confidence.

    With k left out the median lies outside with twice the chance of k or fewer heads in `count`
    throws of a coin.
    """
    outside, left_out = 2 * 0.5**count, 0
    while 2 * (left_out + 1) < count:
        more = outside + 2 * math.comb(count, left_out + 1) * 0.5**count
        if more > 1 - CONFIDENCE:
            break
        outside, left_out = more, left_out + 1
    return left_out, max(0.0, 1 - outside)
