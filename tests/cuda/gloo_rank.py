"""One of two ranks on one GPU: NCCL refuses that, so tensors are exchanged through the host.

python -m tests.cuda.gloo_rank RANK RENDEZVOUS JOBS RESULTS
"""

import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.shard.parallel import Group
from tessera.shard.shared_exchange import SharedExchange
from tests.shard.models.driver import Runner, placement

WORLD_SIZE = 2


class HostExchange:
    """What `SharedExchange` offers, over gloo."""

    def sum(self, x: Tensor) -> None:
        there = x.cpu()
        dist.all_reduce(there)
        x.copy_(there)

    def gather(self, x: Tensor) -> Tensor | None:
        pieces = [torch.empty_like(x, device="cpu") for _ in range(WORLD_SIZE)]
        is_first = dist.get_rank() == 0
        dist.gather(x.cpu(), pieces if is_first else None, dst=0)
        return torch.stack(pieces).to(x.device) if is_first else None

    def broadcast(self, x: Tensor) -> None:
        there = x.cpu()
        dist.broadcast(there, src=0)
        x.copy_(there)


def main() -> None:
    rank, rendezvous, jobs, results = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=WORLD_SIZE
    )
    exchange = cast(SharedExchange, HostExchange())
    group = Group(int(rank), WORLD_SIZE, torch.device("cuda", 0), exchange)
    written: list[Any] = []
    for folder, prompts in torch.load(jobs, weights_only=False):
        runner = Runner(Path(folder), placement("cuda", group=group))
        written.append((runner.batch_logits(prompts), runner.greedy(prompts, 32)))
    torch.save(written, f"{results}{rank}")
    group.close()


if __name__ == "__main__":
    main()
