"""Downloads from a hub that stands on this machine; no test reaches the real one."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.launcher import download
from tessera.launcher.download import Wish, fetch
from tessera.launcher.errors import LaunchError
from tests.launcher.launched import plain_environ
from tests.launcher.stand_in_hub import COMMIT, TOKEN, Hub, serve

MIB = 1 << 20
WEIGHTS = os.urandom(MIB)


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "config.json": b'{"model_type": "llava_next"}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "modeling_custom.py": b"import os",
        "consolidated.safetensors": b"once more",
        "original/params.json": b"{}",
    }
    with serve(Hub(files)) as served:
        yield served


def no_pause(seconds: float) -> None: ...


def wish(hub: Hub, tmp_path: Path, **more: object) -> Wish:
    values = {"model_id": "owner/model", "cache_dir": tmp_path, "endpoint": hub.endpoint}
    return Wish(**(values | more))  # type: ignore[arg-type]


def reason(hub: Hub, tmp_path: Path, **more: object) -> str:
    with pytest.raises(LaunchError) as error:
        fetch(wish(hub, tmp_path, **more), no_pause)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_a_server_needs_is_fetched_and_nothing_that_runs(hub: Hub, tmp_path: Path) -> None:
    folder = fetch(wish(hub, tmp_path), no_pause)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    first = fetch(wish(hub, tmp_path), no_pause)
    hub.requests.clear()
    assert fetch(wish(hub, tmp_path), no_pause) == first
    assert not [line for line in hub.requests if line.startswith("GET /owner")]


def test_the_cache_serves_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    first = fetch(wish(hub, tmp_path), no_pause)
    away = wish(hub, tmp_path, endpoint="http://127.0.0.1:9")
    assert fetch(away, no_pause) == first


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = big = WEIGHTS * 24
    hub.break_after = 20 * MIB
    folder = fetch(wish(hub, tmp_path), no_pause)
    assert (folder / "model.safetensors").read_bytes() == big
    assert len(hub.ranges) == 1 and not hub.ranges[0].startswith("bytes=0-")


def test_a_failing_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.errors = 2
    pauses: list[float] = []
    folder = fetch(wish(hub, tmp_path), pauses.append)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert pauses == [1, 2]


def test_a_hub_that_keeps_failing_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.errors = 1000
    assert f"from {hub.endpoint} failed 5 times" in reason(hub, tmp_path)


def test_an_unknown_repository(hub: Hub, tmp_path: Path) -> None:
    message = reason(hub, tmp_path, model_id="owner/modle")
    assert message.startswith(f"{hub.endpoint} has no model owner/modle, or it is private")


def test_an_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    assert reason(hub, tmp_path, revision="v9") == "owner/model has no revision v9; check REVISION."


def test_a_commit_can_be_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert fetch(wish(hub, tmp_path, revision=COMMIT), no_pause).name == COMMIT


def test_a_gated_model_needs_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    assert "owner/model is gated: accept its terms" in reason(hub, tmp_path)
    assert fetch(wish(hub, tmp_path, token=TOKEN), no_pause).is_dir()


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    message = reason(hub, tmp_path, endpoint="http://127.0.0.1:9")
    assert message.startswith("cannot reach http://127.0.0.1:9, and owner/model is not completely")


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    del hub.files["model.safetensors"]
    assert "owner/model has no *.safetensors" in reason(hub, tmp_path)
    assert not [line for line in hub.requests if line.startswith("GET /owner")]


def test_no_hub_id_at_all(hub: Hub, tmp_path: Path) -> None:
    assert "is neither a folder nor a hub id" in reason(hub, tmp_path, model_id="a/b/c")


def test_a_disk_that_cannot_hold_it_is_told_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 4096

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    message = reason(hub, tmp_path)
    assert "is too full for owner/model: 1 MiB are missing, 4 KiB left" in message
    assert not [line for line in hub.requests if line.startswith("GET /owner")]


def test_a_disk_that_fills_up_meanwhile(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "snapshot_download", full)
    assert "is too full for owner/model: nothing left" in reason(hub, tmp_path)


def run_process(
    hub: Hub, tmp_path: Path, *arguments: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tessera.launcher.download", "--result", str(tmp_path / "result"),
         *arguments],
        env=plain_environ(HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), **environ),
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip


def test_the_process_writes_where_the_model_is(hub: Hub, tmp_path: Path) -> None:
    done = run_process(hub, tmp_path, "--cache-dir", str(tmp_path / "cache"), "--", "owner/model")
    assert done.returncode == 0, done.stderr
    assert (Path((tmp_path / "result").read_text()) / "model.safetensors").exists()
    assert "downloading owner/model: 4 files" in done.stdout
    assert "downloaded owner/model in" in done.stdout


def test_the_process_ends_with_one_line(hub: Hub, tmp_path: Path) -> None:
    done = run_process(hub, tmp_path, "--", "owner/modle")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "has no model owner/modle" in errors[0]


def test_offline_means_that_nothing_is_asked(hub: Hub, tmp_path: Path) -> None:
    done = run_process(hub, tmp_path, "--", "owner/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "and HF_HUB_OFFLINE forbids to fetch it; unset that, or set MODEL_ID to" in done.stderr
    assert not hub.requests
    assert run_process(hub, tmp_path, "--", "owner/model").returncode == 0
    hub.requests.clear()
    assert run_process(hub, tmp_path, "--", "owner/model", HF_HUB_OFFLINE="1").returncode == 0
    assert not hub.requests
