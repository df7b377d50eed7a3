"""Ctrl-C for one process of a foreground job instead of for all of it."""

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def terminal_to_ourselves() -> Iterator[None]:
    """Be the terminal's whole foreground job meanwhile.

    Run by `make`, Ctrl-C would interrupt both: make would end at once and report an error, whatever
    our exit code. Like this it waits for us and takes our exit code for its own. Without a
    terminal, in the background, or alone in the job already, nothing changes.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        terminal = -1
    job = os.getpgrp()
    if terminal < 0 or job == os.getpid() or os.tcgetpgrp(terminal) != job:
        yield
        return
    # Changing the foreground from behind is answered with SIGTTOU; a stop that reaches us alone
    # would leave the terminal to nobody.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpgrp())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal is gone
            os.tcsetpgrp(terminal, job)
        os.close(terminal)
