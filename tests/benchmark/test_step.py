"""Steps of a shard beside their limits, on tiny checkpoints. Times are never judged."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmark import step
from benchmark.checkpoints import CHECKPOINTS, make
from benchmark.steps.cases import Case, StepWriter
from benchmark.steps.shard import Shard
from benchmark.steps.work import Sizes, Work
from benchmark.steps.worker import Result, measure

TINY = Sizes(
    itemsize=2,
    decoder_weights=900,
    tail_weights=100,
    head_weights=100,
    cached_per_token=20,
    attention_width=30,
    picture_weights=500,
    patches=4,
    picture_attention_width=10,
)


def test_a_decode_step_reads_weights_and_contexts_once() -> None:
    work = TINY.decode(3, 50)
    assert work.num_bytes == 2 * (1000 + 100 + 150 * 20)
    assert work.num_flops == 3 * 2 * (1000 + 100) + 4 * 30 * 150


def test_the_end_of_the_last_layer_is_for_sampled_rows_alone() -> None:
    assert TINY.prefill(2, 5).num_flops == 2 * (10 * 900 + 2 * (100 + 100)) + 4 * 30 * 2 * 15


def test_a_prompt_of_one_token_is_a_decode_step() -> None:
    assert TINY.prefill(3, 1) == TINY.decode(3, 1)


def test_a_picture_goes_through_the_tower_tile_by_tile() -> None:
    one, three = TINY.pictures(1), TINY.pictures(3)
    assert one.num_flops == 2 * 500 * 5 + 4 * 10 * 25
    assert three.num_flops == 3 * one.num_flops and three.num_bytes == one.num_bytes == 1000


def test_the_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    work = Work(num_bytes=100, num_flops=1000)
    assert work.limit_s(10.0, 1000.0) == 10.0 and work.is_memory_bound(10.0, 1000.0)
    assert work.limit_s(100.0, 10.0) == 100.0 and not work.is_memory_bound(100.0, 10.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder = tmp_path_factory.mktemp("steps")
    cases = {
        "llama": [Case("decode", 3, 20), Case("prefill", 2, 12)],
        "next-mistral": [Case("pictures", tiles=3)],
    }
    found = []
    for kind, of_kind in cases.items():
        num_blocks = max(case.num_blocks for case in of_kind)
        shard = Shard(make(kind, {}, folder / kind), "cpu", num_blocks, 0, 1, "")
        writer = StepWriter(num_blocks, shard.tile)
        found += [measure(shard, writer, case, 2, 1) for case in of_kind]
    return found


def test_numbers_of_a_step_fit_together(results: list[Result]) -> None:
    assert [result.name for result in results] == [
        "decode 3x20",
        "prefill 2x12",
        "picture of 3 tiles",
    ]
    for result in results:
        assert result.overhead_ms > 0 and result.ms > 0
        assert result.median_wall_ms >= result.wall_ms
        assert result.times_limit == pytest.approx(result.ms / result.limit_ms, rel=0.5)
        by_memory = result.num_bytes / result.read_gb_per_s / 1e6
        by_arithmetic = result.num_flops / result.matrix_gflop_per_s / 1e6
        assert result.limit_ms == pytest.approx(max(by_memory, by_arithmetic), abs=1e-3, rel=0.05)
        assert result.bound == ("memory" if by_memory >= by_arithmetic else "arithmetic")


def test_the_plots_are_pictures(results: list[Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: pip install -e '.[bench]'")
    from benchmark.steps.plots import write_growth, write_roofline

    rows: list[dict[str, Any]] = [{"model": "tiny"} | asdict(result) for result in results]
    write_roofline(rows, tmp_path / "roofline.svg")
    write_growth({"batch": rows[:1], "tiles": rows[2:], "ranks": rows[:1]}, tmp_path / "growth.svg")
    for name in ("roofline", "growth"):
        text = (tmp_path / f"{name}.svg").read_text()
        assert text.startswith("<?xml") and "tiny" in text


def test_workers_tell_every_case_and_ranks_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real processes, one rank and two."""
    monkeypatch.setitem(CHECKPOINTS, "tiny", ("llama", {}))  # type: ignore[misc]
    settings: dict[str, Any] = {"checkpoints": tmp_path, "threads": 1, "rounds": 1}
    for ranks in (1, 2):
        rows = step.times("tiny", [Case("decode", 2, 9)], **settings, ranks=ranks)
        assert [(row["name"], row["ranks"]) for row in rows] == [("decode 2x9", ranks)]
        json.dumps(rows, allow_nan=False)


def test_cases_are_chosen_by_name() -> None:
    assert [case.name for case in step.cases_of("llama-125m", "decode 1x*")] == [
        "decode 1x128",
        "decode 1x1024",
    ]
    assert step.main(["--models", "llama-125m", "--only", "nothing"]) == 2
