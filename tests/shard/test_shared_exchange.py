"""Ranks that talk through shared memory: right sums, any size, in any order of arrival."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from tessera.shard.backends.cpu import kernel_variants
from tessera.shard.shared_exchange import BUFFER_BYTES, SharedExchange, region_bytes

T = TypeVar("T")
SIZES = (1, 7, 513, BUFFER_BYTES // 4, BUFFER_BYTES // 4 + 1, BUFFER_BYTES)  # elements


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    kernel_variants()


def on_ranks(world_size: int, work: Callable[[int, SharedExchange], T]) -> list[T]:
    """Ranks as threads: the operations let go of Python's lock."""
    region = torch.zeros(region_bytes(world_size), dtype=torch.uint8)
    with ThreadPoolExecutor(world_size) as pool:
        ends = [SharedExchange(region, rank, world_size, 20) for rank in range(world_size)]
        return list(pool.map(work, range(world_size), ends))


def part(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_on_all_ranks_whoever_is_late(
    world_size: int, dtype: torch.dtype
) -> None:
    def work(rank: int, exchange: SharedExchange) -> list[Tensor]:
        late = random.Random(rank)
        results = []
        for size in SIZES * 2:
            x = part(rank, size, dtype)
            time.sleep(late.choice((0, 0, 0.001, 0.01)))
            exchange.sum(x)
            results.append(x)
        return results

    first, *others = on_ranks(world_size, work)
    for size, total in zip(SIZES * 2, first, strict=True):
        parts = torch.stack([part(rank, size, dtype).float() for rank in range(world_size)])
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(total.float(), parts.sum(0), rtol=tolerance, atol=tolerance)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_gathers_and_broadcasts_between_sums() -> None:
    def work(rank: int, exchange: SharedExchange) -> list[Tensor | None]:
        results: list[Tensor | None] = []
        for size in SIZES:
            results.append(exchange.gather(torch.full((2, size), rank, dtype=torch.int64)))
            ids = torch.arange(size) if rank == 0 else torch.zeros(size, dtype=torch.int64)
            exchange.broadcast(ids)
            results.append(ids)
            total = torch.ones(size)
            exchange.sum(total)
            results.append(total)
        return results

    for rank, results in enumerate(on_ranks(3, work)):
        for size, (pieces, ids, total) in zip(
            SIZES, zip(*[iter(results)] * 3, strict=True), strict=True
        ):
            assert torch.equal(ids, torch.arange(size))
            assert torch.equal(total, torch.full((size,), 3.0))
            if rank:
                assert pieces is None
            else:
                assert pieces.shape == (3, 2, size)
                assert all(bool((pieces[other] == other).all()) for other in range(3))


def test_a_rank_that_does_not_come_is_named() -> None:
    region = torch.zeros(region_bytes(2), dtype=torch.uint8)
    alone = SharedExchange(region, 0, 2, timeout_s=0.2)
    with pytest.raises(RuntimeError, match="rank 1 did not come"):
        alone.sum(torch.ones(4))


@pytest.mark.parametrize("x", [torch.ones(4, dtype=torch.float64), torch.ones(4, 4).T[:2]])
def test_what_cannot_be_summed_is_refused(x: Tensor) -> None:
    region = torch.zeros(region_bytes(2), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"only float32|contiguous"):
        SharedExchange(region, 0, 2, timeout_s=0.2).sum(x)


PROCESS = """
import sys
import torch
from tessera.shard.backends.cpu import kernel_variants
from tessera.shard.parallel import Group
kernel_variants()
rank, world_size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
group = Group.connect(rank, world_size, torch.device("cpu"), f"file://{meeting}")
assert group._shared is not None
x = group.all_reduce(torch.full((300_000,), float(rank + 1)))
pieces = group.gather_last_dim(torch.full((2, 3), float(rank)))
ids = group.broadcast(torch.tensor([rank, 7 + rank]))
print(x.unique().tolist(), pieces.tolist() if pieces is not None else None, ids.tolist())
group.close()
"""


def test_processes_find_each_others_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(rank), "3", str(tmp_path / "meet")],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(3)
        ]
        outputs = [rank.communicate(timeout=100)[0].strip() for rank in ranks]
    gathered = [[0.0] * 3 + [1.0] * 3 + [2.0] * 3] * 2
    assert outputs == [f"[6.0] {gathered} [0, 7]", "[6.0] None [0, 7]", "[6.0] None [0, 7]"]
