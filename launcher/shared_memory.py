"""Whether /dev/shm is large enough; docker gives a container 64 MB unless told otherwise."""

import os
from pathlib import Path

FOLDER = Path("/dev/shm")
NCCL_BYTES = 1 << 30  # for transport between GPUs that cannot reach each other directly
HOST_BYTES = 48 << 20  # for the sums of ranks that share a host


def check_shared_memory(wanted: int | None, kind: str, world_size: int, total: int) -> str:
    """One sentence when it is too small, empty when it is not.

    Args:
        wanted: SHM_SIZE in bytes.
        kind: of the devices.
        total: size of /dev/shm in bytes, 0 where there is none.
    """
    needed = wanted or 0
    if wanted is None and world_size > 1:
        needed = NCCL_BYTES if kind == "cuda" else HOST_BYTES
    if total >= needed or (wanted is None and total == 0):
        return ""
    said = f"SHM_SIZE={readable(needed)}" if wanted else f"{world_size} shards"
    return (
        f"/dev/shm has {readable(total)} but {said} asks for {readable(needed)}; start the "
        f"container with --shm-size {readable(needed).replace(' ', '').replace('iB', '').lower()}."
    )


def shared_memory_bytes(folder: Path = FOLDER) -> int:
    """Size of the shared-memory file system; 0 where there is none."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_blocks * status.f_frsize


def readable(size: int) -> str:
    """A size as `64 MiB`, in the largest unit that leaves a whole number."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} B"
