"""The processors of this machine that this process may use."""

import os


def usable_processors() -> frozenset[int]:
    """Their numbers; all of the machine's where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
