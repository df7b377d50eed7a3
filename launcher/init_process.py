"""Process 1 of a container: passes signals on and buries orphans, as `docker run --init` would.

Orphans of a container become children of its process 1, which nobody else can bury. A launcher
that did it itself would take away the exit codes that its supervisor waits for.
"""

import contextlib
import os
import signal

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def serve_as_init() -> None:
    """In process 1, fork and return in the child only; elsewhere do nothing.

    Called first in `main`, before there are threads. Process 1 ends with the child's exit code,
    or 128 and the number of the signal that killed it.
    """
    if os.getpid() == 1:
        fork_and_forward()


def fork_and_forward() -> None:
    """What `serve_as_init` does in process 1."""
    watched = {*FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # none is missed from here on
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        told = signal.sigwaitinfo(watched)
        if told.si_signo == signal.SIGCHLD:
            _bury(child)
        # What a terminal sends (Ctrl-C), the kernel has given to the child as well.
        elif told.si_code <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, told.si_signo)


def _bury(child: int) -> None:
    """Take the exit codes of all that have ended; end with that of `child`."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            pid, status = ended
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
