"""The private folder of one launch, and what a killed launch may have left."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tessera.launcher.errors import LaunchError

PREFIX = "tessera-"
LOCK = "lock"
PROBE_TIMEOUT_S = 1.0


@contextlib.contextmanager
def run_folder(parent: Path) -> Iterator[Path]:
    """A new folder that only this user may enter; removed at the end.

    A lock on a file inside says that the launcher lives. The system drops the lock however the
    launcher ends, so the next one can tell and remove what was left.
    """
    sweep(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
        lock = _hold_lock(folder)
    except OSError as error:
        raise LaunchError(
            f"cannot make a folder in {parent}: {error.strerror}; set TMPDIR to a writable one, or "
            f"start the container with --tmpfs {parent}."
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _hold_lock(folder: Path) -> int:
    """Lock first, then show the file: one that is there and not locked belongs to nobody."""
    hidden = folder / f"{LOCK}.new"
    lock = os.open(hidden, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    hidden.rename(folder / LOCK)
    return lock


def sweep(parent: Path) -> None:
    """Remove the folders of launchers that are gone; leave those of other users and living ones."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its launcher lives
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def clear_stale_sockets(prefix: str, world_size: int) -> None:
    """Remove sockets that a killed server left at a path the user chose.

    Raises:
        LaunchError: somebody answers there: another server lives. Or nothing can be put there.
    """
    folder = Path(prefix).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(
            f"{folder} is no folder this user may write to; set SHARD_UDS_PATH to a path in one."
        )
    for rank in range(world_size):
        path = Path(f"{prefix}-{rank}")
        if not path.is_socket():
            continue
        if _answers(path):
            raise LaunchError(
                f"another server uses the socket {path}; stop it or set SHARD_UDS_PATH."
            )
        path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
