"""A picture as a message carries it."""

import base64
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tessera.launcher.chat.errors import ChatError

_URL = re.compile(r"(https?://|data:)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Picture:
    """What is sent, and what to call it."""

    name: str  # as the user wrote it
    url: str  # a data URI, or a URL that the server may fetch if its settings allow that
    path: Path | None = None  # where it came from, if it is a file
    size: tuple[int, int] | None = None  # width and height in pixels, of a file

    def __str__(self) -> str:
        return self.name if self.size is None else f"{self.name} ({self.size[0]} x {self.size[1]})"


def read_picture(source: str) -> Picture:
    """The picture at a path, whose bytes are sent, or at a URL, which is sent as it is.

    Raises:
        ChatError: there is no such file, or it is no picture.
    """
    if _URL.match(source):
        return Picture("data URI" if source[:5].lower() == "data:" else source, source)
    path = Path(source).expanduser()
    try:
        with Image.open(path) as image:
            media_type, size = image.get_format_mimetype(), image.size
        content = path.read_bytes()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ChatError(f"{source}: {reason or 'this is no picture'}") from None
    data = base64.b64encode(content).decode("ascii")
    url = f"data:{media_type or 'application/octet-stream'};base64,{data}"
    return Picture(source, url, path, size)


def sources(argument: str) -> list[str]:
    """The paths and URLs in what was typed: one with spaces in it, or several, quoted or not."""
    try:
        if Path(argument).expanduser().exists():
            return [argument]
        return shlex.split(argument)
    except (OSError, ValueError, RuntimeError):  # too long, an open quote, no such user
        return [argument]
