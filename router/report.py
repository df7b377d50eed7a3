"""What the launcher is told, as lines on a pipe: readiness, and shards that are lost."""

import os

from tessera.proto.supervision import READY, lost_line


class Report:
    """The pipe to the launcher, if there is one."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    @property
    def is_read(self) -> bool:
        """Whether somebody listens, who starts new shards in place of lost ones."""
        return self._fd is not None

    def ready(self) -> None:
        """The shards are warm and requests are taken."""
        self._write(READY)

    def lost(self, incarnation: int, reason: str) -> None:
        """The shards of this incarnation are of no use any more."""
        self._write(lost_line(incarnation, reason))

    def _write(self, line: str) -> None:
        if self._fd is not None:
            os.write(self._fd, f"{line}\n".encode())
