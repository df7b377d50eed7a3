"""The whole GPU benchmark on a processor and a tiny model, so that it works where a GPU is."""

import json
from pathlib import Path

import pytest

from benchmark import gpu
from benchmark.checkpoints import make
from tessera.shard.errors import DeviceError

TINY = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
SIZES = (
    *("--batches", "1", "3"),
    *("--context", "40"),
    *("--prompt", "50"),
    *("--pictures", "2"),
    *("--streams", "3"),
    *("--stream-prompt", "10"),
    *("--stream-tokens", "6"),
    *("--new-tokens", "24"),
    *("--rounds", "1"),
    *("--copy-mib", "4"),
    *("--matrix-size", "64"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("next-mistral", TINY, tmp_path_factory.mktemp("gpu") / "tiny")


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("out") / "gpu.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DEVICE", "")  # is set by the benchmark, and put back here
        arguments = ["--device", "cpu", "--folder", str(folder), "--out", str(out), *SIZES]
        assert gpu.main(arguments) == 0
    return json.loads(out.read_text())


@pytest.mark.timeout(300)
def test_every_step_is_timed_beside_what_the_device_allows(report: dict) -> None:
    assert [row["name"] for row in report["steps"]] == [
        "decode 1x40",
        "decode 3x40",
        "prefill 1x50",
        "2 pictures of 5 tiles",
    ]
    assert all(value > 0 for value in report["ceilings"].values())
    for row in report["steps"]:
        assert row["ms"] > 0 and row["limit_ms"] >= 0
        assert row["bound"] in ("memory", "arithmetic")
        if "idle_share" in row:
            assert 0 <= row["idle_share"] < 1 and row["device_ms"] <= 2 * row["ms"]


def test_the_peer_is_asked_for_the_same_batches(report: dict) -> None:
    assert [row["batch"] for row in report["transformers"]] == [1, 3]
    assert all(row["ours_over_it"] > 0 for row in report["transformers"])


def test_the_server_is_measured_beside_its_bare_steps(report: dict) -> None:
    server = report["server"]
    assert server["streams"] == 3 and server["bare_batch"] == 3
    assert server["share_of_bare"] == pytest.approx(
        server["tokens_per_s"] / server["bare_tokens_per_s"], abs=1e-3
    )


def test_the_report_says_how_it_was_made(report: dict) -> None:
    assert "pytest" in report["about"]["command"] and report["about"]["device"] == "cpu"
    assert "torch" in report["about"]["versions"]


def test_a_server_that_fails_costs_nothing_else(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the server did not start")

    monkeypatch.setattr(gpu, "_server", fails)
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--folder", str(folder), "--out", str(out), *SIZES]
    assert gpu.main([*arguments, "--batches", "1", "--parts", "server", "transformers"]) == 1
    assert "did not start" in capsys.readouterr().err
    report = json.loads(out.read_text())
    assert report["steps"] and report["transformers"] and "server" not in report


def test_an_absent_gpu_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.shard.backends.cuda.available", lambda: False)
    with pytest.raises(DeviceError, match="'cuda' is not available"):
        gpu.main(["--folder", str(folder), *SIZES])
