"""Whether /dev/shm is large enough; docker gives a container 64 MB unless told otherwise."""

import os
from pathlib import Path

from tessera.proto.env import size_text

FOLDER = Path("/dev/shm")
NCCL_BYTES = 1 << 30  # for transport between GPUs that cannot reach each other directly


def check_shared_memory(wanted: int | None, kind: str, world_size: int, total: int) -> str:
    """One sentence when it is too small, empty when it is not.

    Args:
        wanted: SHM_SIZE in bytes.
        kind: of the devices.
        total: size of /dev/shm in bytes, 0 where there is none.
    """
    needed = wanted or 0
    if wanted is None and world_size > 1 and kind == "cuda":
        needed = NCCL_BYTES  # elsewhere ranks use no /dev/shm
    if total >= needed or (wanted is None and total == 0):
        return ""
    flag = size_text(needed).removesuffix("iB").replace(" ", "").lower()
    who = "SHM_SIZE asks for" if wanted else f"{world_size} shards need"
    return (
        f"{who} {size_text(needed)} of shared memory but /dev/shm has {size_text(total)}; start "
        f"the container with --shm-size {flag}."
    )


def shared_memory_bytes(folder: Path = FOLDER) -> int:
    """Size of the shared-memory file system; 0 where there is none."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_blocks * status.f_frsize
