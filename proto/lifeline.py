"""A child process ends when the process that started it is gone, however that one ended.

The launcher puts its process id into `LAUNCHER_PID`. A process that was started by hand has no such
variable and keeps living, for instance after the shell that started it.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Mapping

from tessera.proto.env import process_environment

LAUNCHER_PID = "LAUNCHER_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 1.0


def die_with_parent(
    environ: Mapping[str, str] | None = None, death: signal.Signals = signal.SIGKILL
) -> None:
    """Arrange that this process gets `death` when the one named in `LAUNCHER_PID` ends.

    Called first in a child's `main`, from the main thread.

    Args:
        environ: where `LAUNCHER_PID` is looked up; this process's environment if left out.
        death: SIGKILL cannot be missed; a process with children of its own wants SIGTERM.
    """
    parent = (process_environment() if environ is None else environ).get(LAUNCHER_PID, "")
    if not parent.isdigit():
        return
    if not _signal_on_parent_death(death):
        watcher = threading.Thread(target=_poll, args=(int(parent), death), daemon=True)
        watcher.start()
    # The parent may have ended before the arrangement stood; then nobody sends the signal.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), death)


def _signal_on_parent_death(death: signal.Signals) -> bool:
    """Ask Linux for the signal; False where the system has no such call."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(PR_SET_PDEATHSIG, int(death), 0, 0, 0) == 0


def _poll(parent: int, death: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), death)
