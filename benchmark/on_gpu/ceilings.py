"""What the device allows: the rates that shares are shares of, measured in the same run."""

from dataclasses import dataclass

import torch

from benchmark.kernels import Bench


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates per second."""

    copied_bytes: float  # read plus written, by a copy within the device's memory
    matrix_flops: float  # of a product of two square matrices


def ceilings(bench: Bench, copy_mib: int, matrix_size: int) -> Ceilings:
    """The best of some repetitions each, in the dtype of the benchmark, on random numbers."""
    source = torch.ones(copy_mib << 20, dtype=torch.uint8, device=bench.backend.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / bench.best_s(lambda _: target.copy_(source))
    x, weight = (bench.random(matrix_size, matrix_size) for _ in range(2))
    linear = bench.backend.linear(weight, None)
    product = 2 * matrix_size**3 / bench.best_s(lambda _: linear(x))
    return Ceilings(copied, product)


def best(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of each rate."""
    return Ceilings(
        max(first.copied_bytes, second.copied_bytes), max(first.matrix_flops, second.matrix_flops)
    )
