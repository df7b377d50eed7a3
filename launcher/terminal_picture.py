"""A picture as coloured half blocks, so that a terminal shows what the model was asked about."""

from itertools import groupby
from pathlib import Path

from PIL import Image

UPPER_HALF = "\u2580"
RESET = "\x1b[0m"


def half_blocks(path: Path, columns: int = 40) -> str:
    """Lines of half blocks: two pixels per character, the upper one as its ink."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    rows = max(1, round(columns * picture.height / picture.width / 2))
    small = picture.resize((columns, 2 * rows), Image.Resampling.BOX)
    data = small.tobytes()
    pixels = [tuple(data[i : i + 3]) for i in range(0, len(data), 3)]
    lines = []
    for row in range(0, 2 * rows, 2):
        upper = pixels[row * columns : (row + 1) * columns]
        lower = pixels[(row + 1) * columns : (row + 2) * columns]
        colors = [_colors(*pair) for pair in zip(upper, lower, strict=True)]
        runs = (code + UPPER_HALF * len(list(same)) for code, same in groupby(colors))
        lines.append("".join(runs) + RESET)
    return "\n".join(lines)


def _colors(upper: tuple[int, ...], lower: tuple[int, ...]) -> str:
    """The escape code for the colours of one character."""
    ink, paper = (";".join(map(str, pixel)) for pixel in (upper, lower))
    return f"\x1b[38;2;{ink};48;2;{paper}m"
