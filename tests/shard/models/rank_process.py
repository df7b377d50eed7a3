"""One rank of a group of processes: runs jobs and writes down what came out.

python -m tests.shard.models.rank_process RANK WORLD_SIZE RENDEZVOUS JOBS RESULTS
"""

import sys
from pathlib import Path

import torch

from tessera.shard.parallel import Group
from tests.shard.models.driver import Runner, placement


def main() -> None:
    rank, world_size, rendezvous, jobs, results = sys.argv[1:]
    torch.set_num_threads(1)
    group = Group.connect(int(rank), int(world_size), torch.device("cpu"), f"file://{rendezvous}")
    written = []
    for folder, backend, prompts in torch.load(jobs, weights_only=False):
        runner = Runner(Path(folder), placement(backend, group=group))
        logits = runner.batch_logits(prompts)
        written.append((logits, runner.greedy(prompts, 32)))
    torch.save(written, f"{results}{rank}")
    group.close()


if __name__ == "__main__":
    main()
