"""A launcher around stub processes, as a test sees it from outside."""

import os
import select
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

STUB_LAUNCHER = Path(__file__).with_name("stub_launcher.py")
PATIENCE_S = 60.0
INHERITED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds; generous, because the machine is shared."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def plain_environ(**more: str) -> dict[str, str]:
    """An environment without this machine's own settings."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | more


@dataclass
class Launched:
    """A running launcher around stubs, and what can be seen of it from outside."""

    process: subprocess.Popen[bytes]
    folder: Path
    pipe: int | None = None  # the log's reading end, when it is no file
    _read: bytes = b""

    @property
    def log(self) -> str:
        if self.pipe is not None and select.select([self.pipe], [], [], 0)[0]:
            self._read += os.read(self.pipe, 65536)
        path = self.folder / "log"
        return path.read_text() if path.exists() else self._read.decode()

    def close_pipe(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe)
        self.pipe = None

    @property
    def temporary(self) -> Path:
        return self.folder / "t"

    @property
    def diary(self) -> list[list[str]]:
        """[name..., pid, text...] lines of the stubs, as words."""
        path = self.folder / "diary"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def pids(self) -> list[int]:
        return [int(word) for line in self.diary if line[-1] == "started" for word in line[-2:-1]]

    def await_log(self, text: str) -> None:
        eventually(lambda: text in self.log or self.process.poll() is not None, text)
        assert text in self.log, self.log

    def await_end(self) -> int:
        return self.process.wait(PATIENCE_S)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def assert_nothing_left(self, pids: list[int]) -> None:
        eventually(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
        assert list(self.temporary.iterdir()) == []


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


Launch = Callable[..., Launched]
