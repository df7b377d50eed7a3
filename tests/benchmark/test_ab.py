"""Two states of the repository against each other; and how sure one can be of a ratio."""

import json
import sys
from pathlib import Path

import pytest

from benchmark import ab
from benchmark.ratios import ratio_of


def test_a_number_is_found_by_its_path() -> None:
    report = {"steps": [{"ms": 3}, {"ms": 4.5}]}
    assert ab.number_at(report, "steps.1.ms") == 4.5
    for path in ("steps.2.ms", "steps.0.none", "steps", "steps.x.ms"):
        with pytest.raises(SystemExit, match="no number"):
            ab.number_at(report, path)


def test_both_states_are_measured_in_turn_with_their_own_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"old": tmp_path / "old", "new": tmp_path / "new"}
    monkeypatch.setattr(ab, "copy_of", folders.__getitem__)
    monkeypatch.setattr(ab, "COPIES", tmp_path)
    # What is "measured": 10 with the old state's path first, 5 with the new one's.
    source = (
        "import json, os, sys; from pathlib import Path;"
        "is_new = Path(os.environ['PYTHONPATH'].split(os.pathsep)[0]).parts[-2] == 'new';"
        "Path(sys.argv[1]).write_text(json.dumps({'ms': 5 if is_new else 10}))"
    )
    out = tmp_path / "ratio.json"
    arguments = ["old", "new", "--rounds", "6", "--value", "ms", "--out", str(out)]
    assert ab.main([*arguments, "--", "python", "-c", source, "{out}"]) == 0
    told = json.loads(out.read_text())
    assert told["values_a"] == [10] * 6 and told["values_b"] == [5] * 6
    assert told["ratio"]["median"] == 0.5 and told["about"]["a"] == "old"
    assert "new / old = 0.500" in capsys.readouterr().out


def test_a_command_that_fails_is_quoted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no luck')"]
    with pytest.raises(SystemExit, match="no luck"):
        ab.measure(tmp_path, command, tmp_path / "out.json", "ms")


def test_a_state_that_git_does_not_know() -> None:
    assert ab.main(["no-such-state", "."]) == 2


def test_a_ratio_is_taken_within_rounds() -> None:
    ratio = ratio_of([2, 20, 200, 2, 20, 200], [1, 10, 100, 1, 10, 100])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.is_decided and ratio.rounds == 6 and ratio.confidence == pytest.approx(0.9688)


@pytest.mark.parametrize(("rounds", "left_out"), [(5, 0), (6, 0), (9, 1), (12, 2)])
def test_the_interval_leaves_out_what_chance_allows(rounds: int, left_out: int) -> None:
    ratio = ratio_of(list(range(1, rounds + 1)), [1] * rounds)
    assert (ratio.low, ratio.high) == (1 + left_out, rounds - left_out)
    assert (ratio.confidence >= 0.95) == (rounds > 5)


def test_an_interval_around_one_decides_nothing() -> None:
    assert not ratio_of([0.9, 1.1] * 4, [1.0] * 8).is_decided
    for above, below in (([], []), ([1.0], []), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="equal length"):
            ratio_of(above, below)
