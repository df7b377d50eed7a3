"""Numbers that describe a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from benchmark.simulation.policy import Policy
from benchmark.simulation.run import Record, Totals

Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a client calls good service."""

    ttft_s: float
    ttft_per_prompt_token_s: float  # a long prompt may take longer
    per_token_s: float  # mean time between the tokens of an answer

    def is_met(self, record: Record) -> bool:
        """Whether a request was served well. A client that left before any token was not."""
        times = record.token_times
        if not times:
            return False
        allowed = self.ttft_s + record.sequence.num_prompt_tokens * self.ttft_per_prompt_token_s
        mean = (times[-1] - times[0]) / max(1, len(times) - 1)
        return times[0] - record.arrived_s <= allowed and mean <= self.per_token_s


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    rank = -(-len(ordered) * share // 1)
    return ordered[max(0, int(rank) - 1)]


def summarise(
    policy: Policy, records: list[Record], totals: Totals, objective: Objective
) -> dict[str, Numbers]:
    """Numbers over all requests (`"all"`) and over each kind of request."""
    report = {"all": _latencies(records, objective) | _sums(policy, records, totals, objective)}
    kinds = sorted({record.arrival.kind for record in records})
    if len(kinds) > 1:
        for kind in kinds:
            of_kind = [record for record in records if record.arrival.kind == kind]
            report[kind] = _latencies(of_kind, objective)
    return {name: _rounded(numbers) for name, numbers in report.items()}


def _latencies(records: list[Record], objective: Objective) -> Numbers:
    ttft = [r.token_times[0] - r.arrived_s for r in records if r.token_times]
    queued = [r.started_s - r.arrived_s for r in records if r.started_s is not None]
    whole = [r.ended_s - r.arrived_s for r in records if r.token_times and r.ended_s is not None]
    gaps = [gaps_of(r) for r in records]
    flat = [gap for of_one in gaps for gap in of_one]
    numbers: Numbers = {"requests": len(records), "answered": len(ttft)}
    for name, values in (("ttft", ttft), ("itl", flat), ("queue", queued), ("e2e", whole)):
        for share in (50, 90, 99):
            numbers[f"{name}_p{share}_s"] = percentile(values, share / 100)
    numbers["longest_stall_s"] = max(flat, default=0.0)
    numbers["good_share"] = _share(records, objective.is_met)
    return numbers


def gaps_of(record: Record) -> list[float]:
    """Times between a stream's tokens."""
    return [later - earlier for earlier, later in pairwise(record.token_times)]


def _sums(policy: Policy, records: list[Record], totals: Totals, objective: Objective) -> Numbers:
    seconds = totals.end_s or 1.0
    started = [r for r in records if r.started_s is not None]
    prompt = sum(r.sequence.num_prompt_tokens for r in started)
    shown = sum(len(r.arrival.request.images) for r in started)
    output = sum(len(r.token_times) for r in records)
    return {
        "refused": sum(r.was_refused for r in records),
        "left": sum(r.has_left for r in records),
        "simulated_s": totals.end_s,
        "output_tokens": output,
        "output_tokens_per_s": output / seconds,
        "goodput_per_s": sum(map(objective.is_met, records)) / seconds,
        "steps": totals.steps,
        "tokens_per_step": totals.tokens / max(1, totals.steps),
        "max_step_tokens": totals.max_step_tokens,
        "max_running": totals.max_running,
        "device_busy_share": totals.busy_s / seconds,
        "kv_mean_share": totals.kv_seconds / (totals.busy_s or 1.0),
        "kv_max_share": totals.max_kv_share,
        "preemptions": policy.num_preemptions,
        "prefix_hit_share": sum(r.sequence.num_cached for r in started) / max(1, prompt),
        "images_shown": shown,
        "images_encoded": totals.images,
        "encodes_saved_share": 1 - totals.images / shown if shown else 0.0,
        "max_feature_tokens": totals.max_feature_tokens,
        "wasted_tokens": totals.wasted_tokens,
    }


def _share(records: list[Record], is_so: Callable[[Record], bool]) -> float:
    return sum(map(is_so, records)) / max(1, len(records))


def _rounded(numbers: Numbers) -> Numbers:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}
