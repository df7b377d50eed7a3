"""One rank of a shard that is timed: a process, told what to do by a JSON argument.

Prints each result as a line of JSON on rank 0. Started by `benchmark.step`, with the number of
threads in the environment, where OpenMP reads it.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmark.steps.cases import Case, StepWriter
from benchmark.steps.shard import Shard, Took
from tessera.proto.process import keep_what_is_there


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do."""

    folder: str
    device: str
    threads: int  # on cpu; 0: torch's own choice
    rank: int
    ranks: int
    meeting: str
    rounds: int
    cases: list[dict[str, object]]  # fields of `Case`


@dataclass(frozen=True, slots=True)
class Result:
    """One case, beside the limits measured between its steps."""

    name: str
    kind: str
    batch: int
    length: int
    tiles: int
    ranks: int
    ms: float  # the shortest step
    wall_ms: float
    median_wall_ms: float
    overhead_ms: float  # median of what is neither in the model nor in the sampler
    read_gb_per_s: float
    matrix_gflop_per_s: float
    num_bytes: int
    num_flops: int
    limit_ms: float
    times_limit: float
    bound: str  # memory or arithmetic


def measure(shard: Shard, writer: StepWriter, case: Case, rounds: int, ranks: int) -> Result:
    """Steps of a case and the device's limits in turn; the best of each counts."""
    took: list[Took] = []
    read_rate = matrix_rate = 0.0
    for number in range(rounds + 1):
        steps = [(shard.run(step), is_timed) for step, is_timed in writer.steps(case)]
        if number:  # the first round warms up
            took += [each for each, is_timed in steps if is_timed]
        read_rate = max(read_rate, shard.limits.read_rate())
        matrix_rate = max(matrix_rate, shard.limits.matrix_rate())
    shard.run(writer.clear())
    work = case.work(shard.sizes)
    best_s = min(each.total_s for each in took)
    limit_s = work.limit_s(read_rate, matrix_rate)
    overhead_s = statistics.median(each.wall_s - each.needed_s for each in took)
    is_memory = work.is_memory_bound(read_rate, matrix_rate)
    return Result(
        **asdict(case),
        name=case.name,
        ranks=ranks,
        ms=round(best_s * 1e3, 3),
        wall_ms=round(min(each.wall_s for each in took) * 1e3, 3),
        median_wall_ms=round(statistics.median(each.wall_s for each in took) * 1e3, 3),
        overhead_ms=round(overhead_s * 1e3, 3),
        read_gb_per_s=round(read_rate / 1e9, 2),
        matrix_gflop_per_s=round(matrix_rate / 1e9, 1),
        num_bytes=work.num_bytes,
        num_flops=work.num_flops,
        limit_ms=round(limit_s * 1e3, 3),
        times_limit=round(best_s / limit_s, 3),
        bound="memory" if is_memory else "arithmetic",
    )


def main() -> int:
    order = Order(**json.loads(sys.argv[1]))
    cases = [Case(**fields) for fields in order.cases]  # type: ignore[arg-type]
    if order.threads:
        torch.set_num_threads(order.threads)
    num_blocks = max(case.num_blocks for case in cases)
    shard = Shard(
        Path(order.folder), order.device, num_blocks, order.rank, order.ranks, order.meeting
    )
    keep_what_is_there()
    writer = StepWriter(num_blocks, shard.tile)
    for case in cases:
        result = measure(shard, writer, case, order.rounds, order.ranks)
        if order.rank == 0:
            print(json.dumps(asdict(result)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
