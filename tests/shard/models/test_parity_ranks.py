"""Several ranks give the logits of one: as processes over gloo, as threads for the odd sizes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.shard.errors import CheckpointError
from tessera.shard.models import load_model
from tessera.shard.parallel import Group
from tests import checkpoints
from tests.shard.models.cases import ATOL, image_case, mixed_cases, text_case
from tests.shard.models.driver import Runner, on_ranks, placement
from tests.shard.models.oracle import Oracle

Oracles = Callable[[str], Oracle]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def two_processes(
    oracle: Oracles, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Kind -> what each of two ranks computed; one pair of processes does all kinds."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [
        (str(checkpoint(kind)), "cpu", [case.prompt for case in mixed_cases(oracle(kind))])
        for kind in checkpoints.KINDS
    ]
    torch.save(jobs, folder / "jobs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    files = [str(folder / name) for name in ("rendezvous", "jobs", "results")]
    command = [sys.executable, "-m", "tests.shard.models.rank_process"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", *files], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0]
    results = [torch.load(folder / f"results{rank}", weights_only=False) for rank in range(2)]
    return {kind: [result[i] for result in results] for i, kind in enumerate(checkpoints.KINDS)}


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_two_processes(kind: str, two_processes: dict[str, list[Any]], oracle: Oracles) -> None:
    cases = mixed_cases(oracle(kind))
    (logits, greedy), (no_logits, same_greedy) = two_processes[kind]
    for case, ours in zip(cases, logits, strict=True):
        torch.testing.assert_close(ours, oracle(kind).logits(case), atol=ATOL, rtol=0)
    assert greedy == [oracle(kind).greedy(case, 32) for case in cases]
    assert same_greedy == greedy
    assert all(part.numel() == 0 for part in no_logits)


def run_ranks(folder: Path, world_size: int, oracle: Oracle, aspect: str | None) -> None:
    """`world_size` ranks as threads agree with transformers."""
    case = image_case(oracle, aspect) if aspect else text_case(oracle)

    def one(group: Group) -> torch.Tensor:
        return Runner(folder, placement(group=group)).logits(case.prompt)

    logits, *others = on_ranks(world_size, one)
    torch.testing.assert_close(logits, oracle.logits(case), atol=ATOL, rtol=0)
    assert all(other.numel() == 0 for other in others)


@pytest.mark.parametrize("kind", ["next-mistral", "next-vicuna", "llava15"])
def test_four_ranks(kind: str, oracle: Oracles, checkpoint: Callable[[str], Path]) -> None:
    """next-mistral has two key/value heads: each is held by two of the four ranks."""
    run_ranks(checkpoint(kind), 4, oracle(kind), "4:3")


def test_three_ranks_share_nothing_evenly(tmp_path: Path) -> None:
    """641 rows of vocabulary, 250 inner columns, four vision heads; the output bias must be added
    once, not three times."""
    text = {
        "vocab_size": 641,
        "hidden_size": 96,
        "intermediate_size": 250,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
    }
    changes = {"text_config": text, "vision_config": {"intermediate_size": 127}}
    folder = checkpoints.make("next-vicuna", tmp_path / "odd", changes)
    run_ranks(folder, 3, Oracle(folder), "tall")


def test_more_ranks_than_vision_heads(tmp_path: Path) -> None:
    """Every rank runs the whole tower."""
    changes = {"vision_config": {"num_attention_heads": 2}}
    folder = checkpoints.make("next-vicuna", tmp_path / "few", changes)
    run_ranks(folder, 4, Oracle(folder), "4:3")


def test_more_ranks_than_the_vocabulary_fills(tmp_path: Path) -> None:
    """The last of four ranks has no row at all of five."""
    folder = checkpoints.make("llama", tmp_path / "small", {"vocab_size": 5})
    oracle = Oracle(folder)
    case = oracle.text_case([1, 4, 3, 0, 2, 2])

    def one(group: Group) -> torch.Tensor:
        return Runner(folder, placement(group=group)).logits(case.prompt)

    ours = on_ranks(4, one)[0]
    torch.testing.assert_close(ours, oracle.logits(case), atol=ATOL, rtol=0)


def test_tied_embeddings_on_two_ranks(tmp_path: Path) -> None:
    folder = checkpoints.make("llama", tmp_path / "tied", {"tie_word_embeddings": True})
    run_ranks(folder, 2, Oracle(folder), None)


def test_ranks_that_cannot_share_the_heads(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"NUM_SHARD can be 1, 2, 4$"):
        load_model(checkpoint("next-mistral"), placement(group=Group(0, 3)))
