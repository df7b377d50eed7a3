"""Ranks on a GPU: NCCL with one, two processes on one GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tessera.shard.parallel import BACKENDS, Group
from tests import checkpoints
from tests.shard.models.cases import ATOL, mixed_cases
from tests.shard.models.oracle import Oracle

ROOT = Path(__file__).parents[2]
KINDS = ["mistral", "next-mistral"]


def test_nccl_with_one_rank(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group(
        BACKENDS["cuda"], init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        group = Group(0, 1, device)
        x = torch.arange(1000.0, device=device)
        assert torch.equal(group._all_reduce(x.clone()), x)
        assert torch.equal(group._broadcast(x.clone()), x)
        gathered = group._gather(x)
        assert gathered is not None and torch.equal(gathered[0], x)
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(300)
def test_two_processes_on_one_gpu(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    oracles = {kind: Oracle(checkpoint(kind)) for kind in KINDS}
    assert set(KINDS) <= set(checkpoints.KINDS)
    jobs = [
        (str(checkpoint(kind)), [case.prompt for case in mixed_cases(oracle)])
        for kind, oracle in oracles.items()
    ]
    torch.save(jobs, tmp_path / "jobs")
    files = [str(tmp_path / name) for name in ("rendezvous", "jobs", "results")]
    command = [sys.executable, "-m", "tests.cuda.gloo_rank"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "GLOO_SOCKET_IFNAME": "lo",  # the host's own name may not resolve to itself
    }
    ranks = [
        subprocess.Popen([*command, str(rank), *files], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0]
    first, second = (
        torch.load(tmp_path / f"results{rank}", weights_only=False) for rank in range(2)
    )
    for oracle, (logits, greedy), (_, same_greedy) in zip(
        oracles.values(), first, second, strict=True
    ):
        cases = mixed_cases(oracle)
        for case, ours in zip(cases, logits, strict=True):
            torch.testing.assert_close(ours, oracle.logits(case), atol=ATOL, rtol=0)
        assert greedy == same_greedy == [oracle.greedy(case, 32) for case in cases]
