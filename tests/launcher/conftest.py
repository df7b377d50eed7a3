import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.launched import (
    STUB_LAUNCHER,
    Launch,
    Launched,
    alive,
    eventually,
    plain_environ,
)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "stub"}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def launch(tmp_path: Path, model_folder: Path) -> Iterator[Launch]:
    """Start a launcher around stubs: `launch("--flag", ..., stub={"router": ["mode"]})`."""
    started: list[Launched] = []

    def start(
        *flags: str,
        stub: dict[str, list[str]] | None = None,
        piped: bool = False,
        program: Path = STUB_LAUNCHER,
        **environ: str,
    ) -> Launched:
        folder = tmp_path / f"launch{len(started)}"
        (folder / "t").mkdir(parents=True)
        said = plain_environ(
            TMPDIR=str(folder / "t"),
            MODEL_ID=str(model_folder),
            HOSTNAME="127.0.0.1",
            PORT="0",
            NUM_SHARD="2",
            STUB=json.dumps(stub or {}),
            DIARY=str(folder / "diary"),
        )
        pipe, log_fd = os.pipe() if piped else (None, None)
        with os.fdopen(log_fd, "wb") if log_fd else (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(program), *flags],
                env=said | environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(Launched(process, folder, pipe))
        return started[-1]

    yield start
    for launched in started:
        if launched.process.poll() is None:
            launched.process.send_signal(signal.SIGKILL)
            launched.process.wait()
        launched.close_pipe()
        for pid in launched.pids:
            eventually(lambda pid=pid: not alive(pid), "the stubs' end")  # type: ignore[misc]
