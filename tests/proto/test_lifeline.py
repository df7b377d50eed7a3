import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tessera.proto import lifeline

PATIENCE_S = 30.0

CHILD = """
import os, sys, time
from tessera.proto.lifeline import die_with_parent
{before}
die_with_parent()
print("living", os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import os, subprocess, sys, time
environ = dict(os.environ)
{environ}
child = subprocess.Popen([sys.executable, "-c", {child!r}], env=environ, start_new_session=True)
time.sleep(60)
"""


def start_family(environ: str, before: str = "") -> tuple[subprocess.Popen[str], int]:
    """A parent with one child; returns the parent and the child's process id."""
    program = PARENT.format(environ=environ, child=CHILD.format(before=before))
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    word, pid = parent.stdout.readline().split()
    assert word == "living"
    return parent, int(pid)


def is_gone(pid: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def end(parent: subprocess.Popen[str]) -> None:
    parent.kill()
    parent.wait()
    if parent.stdout is not None:
        parent.stdout.close()


NAMED = 'environ["LAUNCHER_PID"] = str(os.getpid())'


def test_a_child_dies_when_its_launcher_is_killed() -> None:
    parent, pid = start_family(NAMED)
    end(parent)
    assert is_gone(pid, PATIENCE_S)


def test_a_process_started_by_hand_lives_on() -> None:
    parent, pid = start_family('environ.pop("LAUNCHER_PID", None)')
    end(parent)
    try:
        assert not is_gone(pid, 0.5)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_polling_does_where_the_system_has_no_such_call() -> None:
    before = (
        "from tessera.proto import lifeline; lifeline._signal_on_parent_death = lambda _: False"
    )
    parent, pid = start_family(NAMED, before)
    end(parent)
    assert is_gone(pid, PATIENCE_S)


def test_a_child_whose_launcher_is_gone_already_ends_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(before="")],
        env=os.environ | {"LAUNCHER_PID": "999999999"},
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


def test_no_launcher_in_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "_signal_on_parent_death", lambda _death: pytest.fail("asked"))
    lifeline.die_with_parent({})
    lifeline.die_with_parent({"LAUNCHER_PID": "soon"})
