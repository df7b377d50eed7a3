"""A real process that does what process 1 of a container does."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.launcher.launched import PATIENCE_S, eventually

# The child prints its process id, then what it is told; `end` follows.
PROGRAM = """
import ctypes, os, signal, sys, time
from tessera.launcher.init_process import fork_and_forward

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come here, as they come to process 1
fork_and_forward()
def told(number, frame):
    print(signal.Signals(number).name, flush=True)
signal.signal(signal.SIGHUP, told)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
{more}
print(os.getpid(), flush=True)
while True:
    time.sleep(0.05)
"""

# A grandchild that outlives its parent.
ORPHAN = """
if (middle := os.fork()) == 0:
    if (orphan := os.fork()) == 0:
        time.sleep(0.2)
        os._exit(0)
    print(orphan, flush=True)
    os._exit(0)
os.waitpid(middle, 0)
"""


@contextmanager
def started(more: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM.format(more=more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_signals_reach_the_child_and_its_exit_code_comes_back() -> None:
    with started() as process:
        assert int(said(process)) != process.pid
        process.send_signal(signal.SIGHUP)
        assert said(process) == "SIGHUP"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 7


def test_a_killed_child_is_told_as_a_shell_tells_it() -> None:
    with started() as process:
        os.kill(int(said(process)), signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL


def test_orphans_are_buried() -> None:
    with started(ORPHAN) as process:
        orphan = int(said(process))
        said(process)
        eventually(lambda: not _exists(orphan), "the orphan's end")
        assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_child_listens_is_not_lost(number: signal.Signals) -> None:
    with started("time.sleep(0.5)") as process:
        process.send_signal(number)
        assert process.wait(PATIENCE_S) != 0


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
