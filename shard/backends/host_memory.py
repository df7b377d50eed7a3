"""How much memory this process may still take on the host, and how much it took at most.

Inside a container the machine's free memory is not ours: the control group's limit counts too.
Layouts: docs.kernel.org, admin-guide/cgroup-v2 and admin-guide/cgroup-v1/memory.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

PROC = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """What one version of control groups calls its files."""

    limit: str
    usage: str
    reclaimable: str  # the line of memory.stat that counts droppable page cache


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def free_host_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """The smaller of the machine's available memory and what each control group leaves."""
    left_by_groups = (
        left
        for folder, files in _groups(proc, cgroup)
        if (left := _left_bytes(folder, files)) is not None
    )
    return max(0, min([psutil.virtual_memory().available, *left_by_groups]))


def used_host_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes(proc: Path = PROC) -> int | None:
    """Most resident memory since `reset_host_peak`, or None where the kernel does not tell."""
    return _first_number(proc / "status", "VmHWM:", unit=1024)


def reset_host_peak(proc: Path = PROC) -> None:
    """Let the next `peak_host_bytes` start from what is resident now (Linux; else no effect)."""
    with contextlib.suppress(OSError):  # a read-only /proc keeps the old peak: an upper bound
        (proc / "clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Give the system what `free` kept for later, where the C library can (glibc).

    Many temporary tensors leave hundreds of megabytes that no later one fits into.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _groups(proc: Path, cgroup: Path) -> Iterator[tuple[Path, _Files]]:
    """Our control group and its ancestors; any of them may hold the tightest limit."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from ((folder, _V2) for folder in _upwards(cgroup, path))
        elif "memory" in controllers.split(","):
            yield from ((folder, _V1) for folder in _upwards(cgroup / "memory", path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder up to the mount. In a container only the mount itself may exist."""
    parts = Path(path.lstrip("/")).parts
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _left_bytes(folder: Path, files: _Files) -> int | None:
    """Limit minus usage, page cache that can be dropped not counted; None without a limit."""
    limit = _first_number(folder / files.limit)
    usage = _first_number(folder / files.usage)
    if limit is None or usage is None:
        return None
    cached = _first_number(folder / "memory.stat", files.reclaimable) or 0
    return limit - max(0, usage - cached)


def _first_number(file: Path, label: str = "", unit: int = 1) -> int | None:
    """The number after `label` at the start of a line, times `unit`; None if there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(label):
            words = line.removeprefix(label).split()
            return int(words[0]) * unit if words and words[0].isdigit() else None
    return None
