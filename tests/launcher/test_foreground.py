"""Ctrl-C at a terminal, with make between the user and the program."""

import os
import pty
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import signal, sys, time
from tessera.launcher.foreground import terminal_to_ourselves

def stop(*_):
    print("stopping", flush=True)
    raise SystemExit(0)

with terminal_to_ourselves():
    signal.signal(signal.SIGINT, stop)
    print("serving", flush=True)
    time.sleep(30)
"""


def read_until(terminal: int, word: str, timeout_s: float = 20) -> str:
    deadline, text = time.monotonic() + timeout_s, ""
    while word not in text:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {word!r} in {text!r}"
        try:
            text += os.read(terminal, 4096).decode()
        except OSError:  # the other end is closed
            break
    return text


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_takes_our_exit_code_after_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "Makefile").write_text(f"run:\n\t@exec {sys.executable} program.py\n")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execlp("make", "make", "run")
    try:
        read_until(terminal, "serving")
        os.write(terminal, b"\x03")
        said = read_until(terminal, "stopping")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert "Error" not in said and "Interrupt" not in said
    finally:
        os.close(terminal)
