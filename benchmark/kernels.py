"""Times the operations of one backend against what the same run measures of the device's limits.

    python -m benchmark.kernels                          the default device, its dtype
    python -m benchmark.kernels --device cpu --threads 1 --dtype float32 --out kernels.json

An operation's limit is the larger of: the bytes it must move over the measured read rate, and the
arithmetic it must do over the measured matrix rate. `times_limit` is its time over that limit; data
that stays in the caches can be below 1. On one CPU thread times are processor time, so that
neighbours on the machine count less; otherwise they are wall time.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmark.results_file import provenance, write_json
from tessera.shard.backends import load_backend
from tessera.shard.backends.base import Backend, CacheShape, StepLayout
from tessera.shard.backends.huge_pages import empty_on_huge_pages

BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128  # Mistral 7B, Llama 3 8B
WIDTH, HIDDEN = 4096, 14336
VISION = (5, 577, 16, 64)  # one LLaVA-NeXT picture in CLIP ViT-L/14 336
DECODES = [(1, 256), (1, 2048), (8, 256), (8, 2048), (32, 2048)]  # sequences, context
PREFILLS = [(1024, 1024), (512, 2048), (4096, 4096)]  # new tokens, context
COLD = 4  # copies of the data that are used in turn, so that caches do not hold it


@dataclass(frozen=True, slots=True)
class Case:
    """One operation to time. `run` is called with the number of the repetition."""

    name: str
    run: Callable[[int], object]
    num_bytes: int
    num_flops: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What one case took, and what the device's limits allow."""

    name: str
    us: float
    gb_per_s: float
    gflop_per_s: float
    times_limit: float


class Bench:
    """The operations of a backend on data of one dtype."""

    def __init__(self, backend: Backend, dtype: torch.dtype, seconds: float) -> None:
        self.backend = backend
        self.dtype = dtype
        self.seconds = seconds
        one_thread = backend.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if one_thread else time.perf_counter

    def best_s(self, run: Callable[[int], object]) -> float:
        """The shortest of the repetitions that fit into the time, at least three."""
        run(0)
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 3 or time.perf_counter() < end:
            self.backend.synchronize()
            start = self.clock()
            run(len(times))
            self.backend.synchronize()
            times.append(self.clock() - start)
        return min(times)

    def random(self, *size: int) -> torch.Tensor:
        """Normal numbers on the device."""
        return torch.randn(size, device=self.backend.device).to(self.dtype)

    def read_rate(self) -> float:
        """Bytes per second of reading a large tensor, which a host has on its largest pages."""
        size = (1 << 26,)
        if self.backend.device.type == "cpu":
            x = empty_on_huge_pages(size, torch.float32).fill_(1)
        else:
            x = torch.ones(size, device=self.backend.device)
        return x.nbytes / self.best_s(lambda _: x.sum())

    def matrix_rate(self) -> float:
        """Operations per second of a large matrix product."""
        size = 2048
        linear, x = self.backend.linear(self.random(size, size), None), self.random(size, size)
        return 2 * size**3 / self.best_s(lambda _: linear(x))

    def results(self) -> Iterator[Result]:
        """Every case, as it is done."""
        read_rate, matrix_rate = self.read_rate(), self.matrix_rate()
        yield Result("read", 0, read_rate / 1e9, 0, 1)
        yield Result("matrix", 0, 0, matrix_rate / 1e9, 1)
        for make in (self.attention, self.linears, self.small, self.vision):
            for case in make():
                took = self.best_s(case.run)
                limit = max(case.num_bytes / read_rate, case.num_flops / matrix_rate)
                rates = (case.num_bytes / took / 1e9, case.num_flops / took / 1e9)
                yield Result(case.name, took * 1e6, *rates, took / limit)

    def attention(self) -> Iterator[Case]:
        """Decode steps and prefill chunks over scattered blocks."""
        for sequences, context in DECODES:
            yield self.attend(f"decode {sequences}x{context}", sequences, 1, context)
        for new, context in PREFILLS:
            yield self.attend(f"prefill {new} of {context}", 1, new, context)

    def attend(self, name: str, sequences: int, new: int, context: int) -> Case:
        """`sequences` times `new` tokens at the end of `context`."""
        blocks = sequences * context // BLOCK_SIZE
        shape = CacheShape(1, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, self.dtype)
        pool_size = COLD * blocks
        (cache,) = self.backend.new_cache(shape, pool_size)
        cache.k_BKPH.normal_()
        cache.v_BKPH.normal_()
        tables = torch.randperm(pool_size, dtype=torch.int32).view(COLD, sequences, -1)
        layouts = [self.layout(table, sequences, new, context) for table in tables]
        q = self.random(sequences * new, HEADS, HEAD_SIZE)
        pairs = sequences * (new * context - new * (new - 1) // 2)  # of a query and a key
        return Case(
            name,
            lambda i: self.backend.attend(q, cache, layouts[i % COLD], None),
            blocks * shape.block_bytes + 2 * q.nbytes,
            4 * pairs * HEADS * HEAD_SIZE,
        )

    def layout(self, table: torch.Tensor, sequences: int, new: int, context: int) -> StepLayout:
        """Equal sequences with the blocks of `table`."""
        device = self.backend.device
        starts = tuple(range(0, sequences * new + 1, new))
        lens = (context,) * sequences
        positions = torch.arange(context - new, context).repeat(sequences)
        rows = torch.arange(sequences).repeat_interleave(new)
        slots = table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return StepLayout(
            positions.to(device),
            slots.long().to(device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(lens, dtype=torch.int32, device=device),
            table.to(device),
            starts,
            lens,
        )

    def linears(self) -> Iterator[Case]:
        """One square layer, at decode and prefill sizes."""
        weights = [self.random(WIDTH, WIDTH) for _ in range(COLD)]
        num_bytes = weights[0].nbytes
        linears = [self.backend.linear(weight, None) for weight in weights]
        for rows in (1, 8, 32, 512):
            x = self.random(rows, WIDTH)
            yield Case(
                f"linear {WIDTH}x{WIDTH} rows {rows}",
                lambda i, x=x: linears[i % COLD](x),  # type: ignore[misc]
                num_bytes + 2 * x.nbytes,
                2 * rows * WIDTH * WIDTH,
            )

    def small(self) -> Iterator[Case]:
        """What is between the matrix products."""
        backend = self.backend
        for rows in (1, 32, 512):
            x, residual, weight = (
                self.random(rows, WIDTH),
                self.random(rows, WIDTH),
                self.random(WIDTH),
            )
            yield Case(
                f"add_rms_norm rows {rows}",
                lambda _, a=x, b=residual, w=weight: backend.add_rms_norm(a, b, w, 1e-5),  # type: ignore[misc]
                4 * x.nbytes,
            )
            gate_up = self.random(rows, 2 * HIDDEN)
            yield Case(
                f"silu_mul rows {rows}",
                lambda _, g=gate_up: backend.silu_mul(g),  # type: ignore[misc]
                gate_up.nbytes * 3 // 2,
            )

    def vision(self) -> Iterator[Case]:
        """Attention of the vision tower."""
        rows, length, heads, head_size = VISION
        q, k, v = (self.random(*VISION) for _ in range(3))
        yield Case(
            f"attend_dense {rows}x{length}",
            lambda _: self.backend.attend_dense(q, k, v),
            4 * q.nbytes,
            4 * rows * heads * head_size * length**2,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Times a backend's operations.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1, help="on cpu")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each operation")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend = load_backend(options.device, options.backend)
    bench = Bench(backend, getattr(torch, options.dtype), options.seconds)
    results = []
    for result in bench.results():
        results.append(asdict(result))
        print(
            f"{result.name:28} {result.us:11.1f} us {result.gb_per_s:8.1f} GB/s "
            f"{result.gflop_per_s:8.1f} GFLOP/s  {result.times_limit:6.2f} x limit",
            flush=True,
        )
    if options.out:
        about = {
            "backend": backend.name,
            "variant": getattr(backend, "variant", None),
            "device": str(backend.device),
            "dtype": options.dtype,
            "threads": options.threads,
        }
        write_json(options.out, {"about": about | provenance("torch"), "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
