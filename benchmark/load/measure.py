"""From records to numbers. Seconds everywhere; percentiles are values of the sample."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from benchmark.load.client import Record


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must keep to be good; None: no limit."""

    ttft_s: float | None = None  # from when it was due to its first text, or end if it has none
    itl_s: float | None = None  # the mean between texts

    def is_met(self, record: Record) -> bool:
        """Whether a request was answered in time."""
        if record.error:
            return False
        first_at = record.text_times[0] if record.text_times else record.ended_at
        if self.ttft_s is not None and first_at - record.due_at > self.ttft_s:
            return False
        return self.itl_s is None or mean_itl_s(record) <= self.itl_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a sample; all 0 where it is empty."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        """The smallest values that so many percent of `values` do not exceed."""
        ordered = sorted(values)
        if not ordered:
            return cls(0.0, 0.0, 0.0)
        ranks = (math.ceil(len(ordered) * share / 100) - 1 for share in (50, 90, 99))
        return cls(*(round(ordered[max(0, rank)], 6) for rank in ranks))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run."""

    requests: int
    answered: int
    good: int  # answered within the objective
    errors: dict[str, int]  # by kind
    output_tokens: int  # of answered requests
    duration_s: float  # from the first request that was due to the last end
    ttft_s: Percentiles
    itl_s: Percentiles  # between two events with text of one answer
    e2e_s: Percentiles
    late_s: Percentiles  # sent after it was due: the load generator's own delay

    @property
    def requests_per_s(self) -> float:
        """Answered requests."""
        return self._per_s(self.answered)

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of answered requests."""
        return self._per_s(self.output_tokens)

    @property
    def goodput_per_s(self) -> float:
        """Requests within the objective."""
        return self._per_s(self.good)

    @property
    def good_share(self) -> float:
        """Of all requests, failed ones included; 0 where there are none."""
        return self.good / self.requests if self.requests else 0.0

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        rates = {
            "requests_per_s": round(self.requests_per_s, 3),
            "output_tokens_per_s": round(self.output_tokens_per_s, 1),
            "goodput_per_s": round(self.goodput_per_s, 3),
            "good_share": round(self.good_share, 4),
        }
        return asdict(self) | {"duration_s": round(self.duration_s, 3)} | rates

    def _per_s(self, count: int) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0


def summarise(records: Sequence[Record], objective: Objective) -> Summary:
    """The numbers of a run that is over."""
    answered = [record for record in records if not record.error]
    began = min((record.due_at for record in records), default=0.0)
    return Summary(
        requests=len(records),
        answered=len(answered),
        good=sum(map(objective.is_met, records)),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        output_tokens=sum(record.num_tokens for record in answered),
        duration_s=max((record.ended_at for record in records), default=0.0) - began,
        ttft_s=Percentiles.of(first for r in answered if (first := ttft_s(r)) is not None),
        itl_s=Percentiles.of(gap for record in answered for gap in gaps_s(record)),
        e2e_s=Percentiles.of(record.ended_at - record.due_at for record in answered),
        late_s=Percentiles.of(record.sent_at - record.due_at for record in records),
    )


def ttft_s(record: Record) -> float | None:
    """From when a request was due to its first text; None if none came."""
    return record.text_times[0] - record.due_at if record.text_times else None


def gaps_s(record: Record) -> list[float]:
    """Between the texts of one answer."""
    return [after - before for before, after in pairwise(record.text_times)]


def mean_itl_s(record: Record) -> float:
    """Mean of `gaps_s`; 0 where there is none."""
    gaps = gaps_s(record)
    return sum(gaps) / len(gaps) if gaps else 0.0
