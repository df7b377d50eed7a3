"""Pictures by path: off by default, regular files below allowed folders only.

Missing, forbidden and outside are told in one sentence: a client cannot find out what exists.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tessera.proto.env import SettingsError
from tessera.router.errors import ValidationError

# Opening must not wait for a FIFO's writer, nor make a terminal this process's own.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class LocalImages:
    """Reads pictures below some folders."""

    def __init__(self, folders: Sequence[str]) -> None:
        """`folders`: absolute paths of ALLOWED_IMAGE_PATHS; none: nothing is read.

        Raises:
            SettingsError: one is no folder, or all there is.
        """
        for folder in folders:
            if not Path(folder).is_absolute() or not Path(folder).is_dir():
                raise SettingsError(
                    f"ALLOWED_IMAGE_PATHS holds {folder!r}; it takes absolute paths of folders."
                )
            if Path(folder).resolve() == Path("/"):
                raise SettingsError("ALLOWED_IMAGE_PATHS must name folders below /, not / itself.")
        self._prefixes = tuple(f"{folder.rstrip('/')}/" for folder in folders)
        self._folders = [Path(folder).resolve() for folder in folders]

    def covers(self, source: str) -> bool:
        """Whether a text is a path and not base64, in which a picture may begin with `/` too."""
        return source.strip().startswith(self._prefixes)

    def read(self, source: str, max_bytes: int) -> bytes:
        """The file at a path or `file:` URI; blocks.

        Returns:
            At most one byte more than `max_bytes`, by which the caller knows that it is larger.

        Raises:
            ValidationError: paths are switched off, or this is no regular file below a folder.
        """
        if not self._folders:
            raise ValidationError(
                "pictures are not read from files; send the picture itself as a data URI, or start "
                "the server with ALLOWED_IMAGE_PATHS"
            )
        try:
            path = Path(_path(source.strip())).resolve(strict=True)
            if not self._contain(path) or not stat.S_ISREG(path.stat().st_mode):
                raise _unreadable()
            return self._contents(path, max_bytes)
        except (OSError, ValueError, RuntimeError):  # a NUL in the name; a loop of links
            raise _unreadable() from None

    def _contents(self, path: Path, max_bytes: int) -> bytes:
        with os.fdopen(os.open(path, _FLAGS), "rb") as file:
            # Folders may have been exchanged for links since the path was resolved.
            opened = Path(f"/proc/self/fd/{file.fileno()}").readlink()
            if not self._contain(opened) or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _unreadable()
            return file.read(max_bytes + 1)

    def _contain(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._folders)


def _path(source: str) -> str:
    """The path that a text names.

    Raises:
        ValidationError: a file of another host.
    """
    if not source.lower().startswith("file:"):
        return source
    uri = urlsplit(source)
    path = unquote(uri.path, errors="strict")
    if uri.netloc.lower() not in ("", "localhost") or not path.startswith("/"):
        raise _unreadable()
    return path


def _unreadable() -> ValidationError:
    return ValidationError(
        "the picture's path is not a readable file below the folders that this server reads "
        "(ALLOWED_IMAGE_PATHS)"
    )
