"""Times whole decode steps of a model in few bits against the same model in bfloat16, on a CPU.

    python -m benchmark.quantized_decode --out benchmark/results/quantized_decode.json

The models take turns: in each round every kind does a few steps, whose median counts. `speedup` is
the median over rounds of bfloat16's time over the kind's. Times are processor time of one thread,
from a step's message to its reply: embedding, all layers, head, sampling. Weights are random, so
only times mean something (`benchmark.checkpoints`).
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmark.checkpoints import CACHE, CHECKPOINTS, checkpoint
from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json
from benchmark.steps.cases import Case, StepWriter
from benchmark.steps.shard import Shard

BASELINE = "bf16"
KINDS = {  # QUANTIZE and KV_CACHE_DTYPE
    BASELINE: ("", "auto"),
    "int8": ("int8", "auto"),
    "int4": ("int4", "auto"),
    "int4, fp8 cache": ("int4", "fp8_e4m3fn"),
}
CASES = [Case("decode", 1, 128), Case("decode", 1, 4096), Case("decode", 8, 128)]


class Contestant:
    """One kind of the model and its time in each round."""

    def __init__(self, kind: str, folder: Path, num_blocks: int) -> None:
        quantize, kv_cache_dtype = KINDS[kind]
        self.kind = kind
        self._shard = Shard(
            folder, "cpu", num_blocks, quantize=quantize, kv_cache_dtype=kv_cache_dtype
        )
        self._writer = StepWriter(num_blocks)
        self.variant = getattr(self._shard.engine.placement.backend, "variant", None)

    def median_s(self, case: Case) -> float:
        """Of a few steps of the case."""
        steps = [(self._shard.run(step), timed) for step, timed in self._writer.steps(case)]
        return statistics.median(took.total_s for took, timed in steps if timed)


def compare(contestants: list[Contestant], case: Case, rounds: int) -> list[dict[str, Any]]:
    """All kinds in turn."""
    times: dict[str, list[float]] = {contestant.kind: [] for contestant in contestants}
    for number in range(rounds + 1):
        for contestant in contestants:
            took = contestant.median_s(case)
            if number:  # the first round warms up
                times[contestant.kind].append(took)
    return [
        {
            "case": case.name,
            "kind": kind,
            "ms": round(statistics.median(took) * 1e3, 2),
            "speedup": asdict(ratio_of(times[BASELINE], took)),
        }
        for kind, took in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=CHECKPOINTS, default="llama-1.1b")
    parser.add_argument("--checkpoints", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = checkpoint(options.model, options.checkpoints)
    num_blocks = max(case.num_blocks for case in CASES)
    contestants = [Contestant(kind, folder, num_blocks) for kind in KINDS]
    results = []
    for case in CASES:
        for result in compare(contestants, case, options.rounds):
            results.append(result)
            speedup = result["speedup"]
            print(
                f"{result['case']:16} {result['kind']:16} {result['ms']:9.2f} ms"
                f" {speedup['median']:6.2f} x bf16 ({speedup['low']:.2f} to {speedup['high']:.2f})",
                flush=True,
            )
    if options.out:
        about = {"model": options.model, "variant": contestants[0].variant, "threads": 1}
        write_json(options.out, {"about": about | provenance("torch"), "results": results})


if __name__ == "__main__":
    main()
