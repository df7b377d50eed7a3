"""Times linear layers of 16, 8 and 4 bits on a CPU against each other and against memory.

    python -m benchmark.quantized_linear --out benchmark/results/quantized_linear.json

All are timed in turn, over copies that no cache holds, as processor time of one thread; the
shortest counts. `times_limit` is the time over that of reading the weight at the rate that the same
run measures for a plain sum; `times_bf16` is the time over that of bfloat16.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.results_file import provenance, write_json
from tessera.shard.backends.cpu import CpuBackend
from tessera.shard.backends.huge_pages import empty_on_huge_pages
from tessera.shard.quantized import pack, quantize

SIZES = [(4096, 4096), (4096, 14336)]  # outputs and inputs in Mistral 7B
ROWS = (1, 8, 32, 128)
COLD_BYTES = 256 << 20  # of copies that are used in turn
KINDS = ("bf16", "int8", "int4")


class Contestant:
    """Copies of one layer, and the shortest time so far for each number of rows."""

    def __init__(self, backend: CpuBackend, kind: str, weight_OI: Tensor) -> None:
        self.kind = kind
        quantized = None if kind == "bf16" else quantize(weight_OI, int(kind[3:]))
        self.num_bytes = weight_OI.nbytes if quantized is None else pack(quantized).nbytes
        self._copies = [
            backend.linear(weight_OI.clone(), None)
            if quantized is None
            else backend.quantized_linear(quantized, None)
            for _ in range(-(-COLD_BYTES // self.num_bytes))
        ]
        self._turn = 0
        self.best_s = dict.fromkeys(ROWS, float("inf"))

    def run(self, x_TI: Tensor) -> None:
        """One more call."""
        self._turn = (self._turn + 1) % len(self._copies)
        rows, copy = x_TI.shape[0], self._copies[self._turn]
        self.best_s[rows] = min(self.best_s[rows], thread_seconds(lambda: copy(x_TI)))


def thread_seconds(run: Callable[[], object]) -> float:
    """Processor time of this thread: neighbours on the machine count less."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def compare(backend: CpuBackend, size: tuple[int, int], seconds: float) -> list[dict[str, Any]]:
    """All kinds of one layer at all numbers of rows."""
    weight_OI = (torch.randn(size) * 0.02).bfloat16()
    contestants = [Contestant(backend, kind, weight_OI) for kind in KINDS]
    inputs = [torch.randn(rows, size[1]).bfloat16() for rows in ROWS]
    # On large pages, as the weights.
    stream = empty_on_huge_pages((COLD_BYTES // 4,), torch.float32).fill_(1)
    read_s = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        read_s = min(read_s, thread_seconds(stream.sum))
        for x_TI in inputs:
            for contestant in contestants:
                for _ in range(max(1, 16 // x_TI.shape[0])):
                    contestant.run(x_TI)
    rate = stream.nbytes / read_s
    return [
        {
            "size": list(size),
            "rows": rows,
            "kind": contestant.kind,
            "us": round(contestant.best_s[rows] * 1e6, 1),
            "times_bf16": round(contestant.best_s[rows] / contestants[0].best_s[rows], 3),
            "times_limit": round(contestant.best_s[rows] * rate / contestant.num_bytes, 2),
            "read_gb_per_s": round(rate / 1e9, 2),
        }
        for rows in ROWS
        for contestant in contestants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="time for each size")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backend = CpuBackend(torch.device("cpu"))
    results = []
    for size in SIZES:
        for result in compare(backend, size, options.seconds):
            results.append(result)
            print(
                f"{size[0]}x{size[1]:<6} rows {result['rows']:<4} {result['kind']}"
                f" {result['us']:10.1f} us {result['times_bf16']:6.2f} x bf16"
                f" {result['times_limit']:6.2f} x limit",
                flush=True,
            )
    if options.out:
        about = {"variant": backend.variant, "threads": 1} | provenance("torch")
        write_json(options.out, {"about": about, "results": results})


if __name__ == "__main__":
    main()
