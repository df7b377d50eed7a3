"""Log lines of every process: one line per event, as text or as JSON, never in the way of serving.

What a client sent may end up in a message, so control characters are escaped: a line break in a
prompt cannot forge a log line. A reader that closed the pipe costs the lines, not the process.
"""

import contextlib
import io
import json
import logging
import os
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TextIO, cast

QUEUE_LINES = 10_000  # held for a reader that is slow; later lines are dropped, not waited for
FLUSH_S = 2.0  # at exit
CHILD = "child"  # attribute of a record: the name of the child process that said it
LOG_KEYS = frozenset({"timestamp", "level", "message", "target", CHILD, "exception"})
"""Of a JSON line; every other key is a field."""

FIELDS = "fields"  # attribute of a record: what it says by name, a dict of texts and numbers

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))}
_CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028"}
_CONTROL[0x2029] = "\\u2029"


def configure_logging(
    level: str = "info",
    json_output: bool = False,
    stream: TextIO | None = None,
    *,
    background: bool = False,
) -> None:
    """Send the log of this process to `stream` (stdout if left out). Called from `main` only.

    Args:
        level: a value of `env.LOG_LEVELS`: debug, info, warning or error.
        background: write from a thread of its own, so that a reader that stopped reading (a
            terminal after Ctrl-S) never stops this process. The launcher needs it, because it
            must keep draining its children; a child's reader is the launcher.
    """
    kind = _BackgroundHandler if background else _PatientHandler
    handler = kind(_unbuffered(stream or sys.stdout or _nowhere()))
    handler.setFormatter(JsonFormatter() if json_output else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.raiseExceptions = False  # a log line that cannot be written must not print another


class TextFormatter(logging.Formatter):
    """`2026-11-20T23:04:09.123Z INFO tessera.router.core: message name=value`, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One event as one line."""
        child = getattr(record, CHILD, "")
        source = f"[{child}]" if child else f"{record.name}:"
        line = f"{_timestamp(record)} {record.levelname:<7} {source} {escaped(_message(record))}"
        for name, value in getattr(record, FIELDS, {}).items():
            line += f" {escaped(name)}={escaped(str(value))}"
        return f"{line} | {escaped(trace)}" if (trace := _trace(record)) else line


class JsonFormatter(logging.Formatter):
    """`{"timestamp": ..., "level": "INFO", "message": ..., "target": ...}`, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One event as one JSON object."""
        event = {
            "timestamp": _timestamp(record),
            "level": record.levelname,
            "message": _message(record),
            "target": record.name,
        }
        if child := getattr(record, CHILD, ""):
            event[CHILD] = child
        if trace := _trace(record):
            event["exception"] = trace
        return json.dumps({**getattr(record, FIELDS, {}), **event})


def escaped(text: str) -> str:
    """`text` with control characters and line breaks made visible."""
    return text.translate(_CONTROL)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # wrong arguments of a log call; the event still counts
        return str(record.msg)


def _trace(record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[0] is not None:
        return logging.Formatter().formatException(record.exc_info)
    return ""


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _nowhere() -> TextIO:
    """For a process that was started without a stdout."""
    return Path(os.devnull).open("w")


def _unbuffered(stream: TextIO) -> TextIO:
    """The same file without Python's buffer: a line is out when it was written, and a write that
    hangs on a stuck reader holds no lock that the interpreter needs to exit."""
    try:
        raw = os.fdopen(os.dup(stream.fileno()), "wb", buffering=0)
    except (OSError, ValueError):  # a stream of a test, without a descriptor
        return stream
    return io.TextIOWrapper(
        cast(BinaryIO, raw), "utf-8", errors="backslashreplace", write_through=True
    )


class _PatientHandler(logging.Handler):
    """Writes lines; when the reader has closed the pipe, the rest goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            self._stream.write(self.format(record) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            silence(self._stream)


def silence(stream: TextIO) -> None:
    """Point a stream whose reader is gone to the null device, where what is still held may go."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # no descriptor behind it, or already closed
        return


class _BackgroundHandler(_PatientHandler):
    """Hands lines to a thread that writes them; a full queue drops lines instead of waiting.

    The thread writes without the handler's lock: a stuck write must not hold up the exit, where
    `logging` takes the lock of every handler.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_LINES)
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the event."""
        with contextlib.suppress(queue.Full):
            self._records.put_nowait(record)

    def flush(self) -> None:
        """Wait for the lines under way, but not longer than a stuck reader deserves."""
        deadline = time.monotonic() + FLUSH_S
        while self._records.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:  # a daemon thread: ends with the process
            record = self._records.get()
            super().emit(record)
            self._records.task_done()
