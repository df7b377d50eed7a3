"""The threads of the CPU kernels: whoever calls them, and however many there are."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tessera.shard.backends.cpu import CpuBackend, kernel_variants
from tests.shard.backends.pool import CPU

WIDTH, CALLS = 2048, 40


def _product(rows: int) -> tuple[CpuBackend, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x_TF = torch.randn(rows, 2 * WIDTH, generator=generator)
    backend = CpuBackend(CPU)
    return backend, x_TF, backend.silu_mul(x_TF)


@pytest.fixture(autouse=True)
def _built() -> None:
    try:
        kernel_variants()
    except OSError as reason:
        pytest.skip(f"CPU kernels are not built: {reason}")


def test_callers_at_the_same_time_get_their_own_results() -> None:
    works = [_product(rows) for rows in (40, 64, 100, 333)]

    def same(number: int) -> bool:
        backend, x_TF, expected = works[number % len(works)]
        return torch.equal(backend.silu_mul(x_TF), expected)

    with ThreadPoolExecutor(len(works)) as pool:
        assert all(pool.map(same, range(CALLS)))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    backend, x_TF, expected = _product(300)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 7, 3, 16):
            torch.set_num_threads(count)
            assert all(torch.equal(backend.silu_mul(x_TF), expected) for _ in range(CALLS))
    finally:
        torch.set_num_threads(before)
