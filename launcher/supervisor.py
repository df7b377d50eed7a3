"""Starts the processes, relays what they say, and stops them all, however it comes to that.

Everything that happens arrives as an event in one queue: a child's end, its readiness, a signal to
this process. One thread, the caller's, takes them and decides; so there is nothing to lock.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from tessera.launcher.errors import LaunchError
from tessera.launcher.plan import ProcessSpec
from tessera.proto.logs import CHILD, FIELDS, LOG_KEYS, escaped

logger = logging.getLogger("tessera.launcher")

MAX_LINE_BYTES = 16_384  # longer ones are cut into pieces
TAIL_LINES = 20
SHOWN_TAIL_LINES = 3
ERROR_PREFIX = "Error: "  # of the one line with which our processes refuse to start
CAUSE_WAIT_S = 1.0  # for the end of a process because of which another has ended or complains
KILL_WAIT_S = 10.0  # until a killed process is gone; longer only when the system is stuck
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Ended:
    """A child has exited. `code` is negative for a signal."""

    name: str
    code: int


@dataclass(frozen=True, slots=True)
class Said:
    """A line on a report pipe: the router's `ready`, the download's folder."""

    text: str


@dataclass(frozen=True, slots=True)
class Signalled:
    """This process was told to stop."""

    number: int


Event = Ended | Said | Signalled
Events = queue.SimpleQueue[Event]


class StopRequested(Exception):
    """A signal asked this process to end; not an error."""


class ChildEnded(LaunchError):
    """A child that was to stay has ended; the message says how."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@contextlib.contextmanager
def signals_to(events: Events) -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGHUP into events; a hang-up that was ignored stays so (nohup)."""

    def handle(number: int, _frame: FrameType | None) -> None:
        events.put(Signalled(number))  # SimpleQueue.put may be called from a signal handler

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Child:
    """One running process, in a session of its own so that a terminal's Ctrl-C is ours alone."""

    def __init__(self, spec: ProcessSpec, events: Events) -> None:
        self.name = spec.name
        self.code: int | None = None  # set by the supervisor when it takes the Ended event
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._events = events
        # Called in the main thread: Linux ties "parent death" to the thread that started a child.
        self._process = subprocess.Popen(
            spec.argv,
            env=dict(spec.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=spec.pass_fds,
            start_new_session=True,
        )
        self._readers = [
            self._start(self._read, pipe, level)
            for pipe, level in (
                (self._process.stdout, logging.INFO),
                (self._process.stderr, logging.WARNING),
            )
        ]
        self._start(self._wait)

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its group."""
        return self._process.pid

    @property
    def last_words(self) -> str:
        """What it said in the end: its `Error:` line, or else the last lines it printed."""
        errors = [line for line in self._tail if line.startswith(ERROR_PREFIX)]
        if errors:
            return f": {errors[-1].removeprefix(ERROR_PREFIX)}"
        told = [line.strip() for line in self._tail if line.strip("~^ ")]  # not a traceback's marks
        shown = " | ".join(told[-SHOWN_TAIL_LINES:])
        return f"; it said last: {shown}." if shown else "."

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and whatever it started."""
        self._signal(signal.SIGKILL, group=True)

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if self._process.returncode is not None:
            return  # reaped, and its group killed before that; the id may be somebody else's now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self.pid, number)

    def _start(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=self.name, daemon=True)
        thread.start()
        return thread

    def _wait(self) -> None:
        """Report the end, with nothing of the group left and everything it said read."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        # Not reaped yet, so the id still is this group's and nobody else can be hit.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join(timeout=5.0)
        self._events.put(Ended(self.name, self._process.wait()))

    def _read(self, pipe: IO[bytes], level: int) -> None:
        with pipe:
            while line := pipe.readline(MAX_LINE_BYTES):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._relay(text, level)

    def _relay(self, text: str, level: int) -> None:
        """Log one line of the child under its name; JSON log lines keep their level."""
        level, message, fields = _parse_log_line(text) or (level, text, {})
        self._tail.append(escaped(message))
        if message.startswith(ERROR_PREFIX):
            level = logging.DEBUG  # the launcher says it itself, as the reason why it ends
        logger.log(level, "%s", message, extra={CHILD: self.name, FIELDS: fields})


def _parse_log_line(text: str) -> tuple[int, str, dict[str, object]] | None:
    """Level, message and fields of a line that our JSON formatter wrote."""
    if not text.startswith("{"):
        return None
    try:
        event = json.loads(text)
        level = logging.getLevelNamesMapping()[event["level"]]
        fields = {name: value for name, value in event.items() if name not in LOG_KEYS}
        return level, str(event["message"]) + _exception_of(event), fields
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _exception_of(event: dict[str, object]) -> str:
    return f"\n{event['exception']}" if "exception" in event else ""


class Supervisor:
    """The children of one launch. Used by one thread."""

    def __init__(self, events: Events, clock: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self._clock = clock
        self._children: list[Child] = []

    @property
    def alive(self) -> list[Child]:
        """The children that have not ended."""
        return [child for child in self._children if child.code is None]

    def start(self, spec: ProcessSpec) -> Child:
        """Start one process.

        Raises:
            LaunchError: the system refused.
        """
        try:
            child = Child(spec, self._events)
        except OSError as error:
            raise LaunchError(f"cannot start {spec.name}: {error.strerror}.") from None
        self._children.append(child)
        return child

    def listen(self, fd: int) -> None:
        """Turn the lines of a report pipe into events; closes the descriptor at its end."""

        def read() -> None:
            with os.fdopen(fd, "rb") as pipe:
                while line := pipe.readline(MAX_LINE_BYTES):
                    self._events.put(Said(line.decode("utf-8", "replace").strip()))

        threading.Thread(target=read, name="report", daemon=True).start()

    def end(self, children: Sequence[Child]) -> None:
        """End children at once and forget them; other events are taken later.

        Raises:
            LaunchError: one does not end.
        """
        others: list[Event] = []
        for child in children:
            child.kill()
        deadline = self._clock() + KILL_WAIT_S
        while any(child.code is None for child in children):
            event = self._next(deadline)
            if event is None:
                raise LaunchError("a killed process does not end; the system is stuck.")
            if not isinstance(event, Ended):
                others.append(event)
        self._children = [child for child in self._children if child not in children]
        for event in others:
            self._events.put(event)

    def wait_for_word(self, deadline: float | None = None) -> str | None:
        """The next line on a report pipe; None when the deadline passed without one.

        Raises:
            ChildEnded: a child ended first.
            StopRequested: this process was told to stop.
        """
        while (event := self._next(deadline)) is not None:
            match event:
                case Said(text):
                    return text
                case Signalled():
                    raise StopRequested
                case Ended():
                    raise ChildEnded(event.name, self._describe_death(event))
        return None

    def wait_for_end(self, child: Child) -> None:
        """Wait until a child that is expected to end has done so, well.

        Raises:
            LaunchError: it failed.
            StopRequested: this process was told to stop.
        """
        while child.code is None:
            match self._next(None):
                case Signalled():
                    raise StopRequested
                case Ended(name, code) as event if name != child.name or code != 0:
                    raise LaunchError(self._describe_death(event))

    def stop(self, children: Sequence[Child], grace_s: float) -> None:
        """Stop children: SIGTERM, `grace_s` seconds, then SIGKILL.

        A second SIGINT meanwhile kills everything at once.
        """
        waiting = [child for child in children if child.code is None]
        for child in waiting:
            child.terminate()
        deadline = self._clock() + grace_s
        while waiting:
            event = self._next(deadline)
            waiting = [child for child in waiting if child.code is None]
            if event is None:
                for child in waiting:
                    logger.warning("%s did not stop within %g s: killed", child.name, grace_s)
                self._kill(waiting)
                return
            if isinstance(event, Signalled) and event.number == signal.SIGINT:
                logger.warning("told to stop again: killing everything")
                self._kill(self.alive)
                return

    def kill_all(self) -> None:
        """End everything now and wait until it is gone."""
        self._kill(self.alive)

    def _kill(self, children: Sequence[Child]) -> None:
        for child in children:
            child.kill()
        deadline = self._clock() + KILL_WAIT_S
        while any(child.code is None for child in children):
            if self._next(deadline) is None:
                logger.error("a killed process does not end; the system is stuck")
                return

    def _next(self, deadline: float | None) -> Event | None:
        """The next event, noted; None when the deadline passed."""
        try:
            wait = None if deadline is None else max(0.0, deadline - self._clock())
            event = self._events.get(timeout=wait)
        except queue.Empty:
            return None
        if isinstance(event, Ended):
            for child in self._children:
                if child.name == event.name:
                    child.code = event.code
        return event

    def _describe_death(self, event: Ended) -> str:
        """How a child ended. One that was not killed may have done so because another is gone,
        which may be heard of a moment later: then both are told."""
        told, others = [self._words(event)], list[Event]()
        deadline = self._clock() + CAUSE_WAIT_S
        while event.code >= 0 and len(told) == 1 and self.alive:
            other = self._next(deadline)
            if other is None:
                break
            if isinstance(other, Ended):
                told.append(self._words(other))
            else:
                others.append(other)
        for other in others:
            self._events.put(other)
        return "; ".join(told)

    def _words(self, event: Ended) -> str:
        words = next(child.last_words for child in self._children if child.name == event.name)
        return f"{event.name} {how_it_ended(event.code)}{words}"


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "an unknown signal"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by {name} (signal {-code}){hint}"
