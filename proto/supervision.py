"""The lines that the router writes for the launcher."""

READY = "ready"
_LOST = "lost"


def lost_line(incarnation: int, reason: str) -> str:
    """The shards of an incarnation are of no use any more."""
    return f"{_LOST} {incarnation} {' '.join(reason.split())}"


def parse_lost(line: str) -> tuple[int, str] | None:
    """(incarnation, reason) of a `lost_line`, None of any other."""
    word, _, rest = line.partition(" ")
    number, _, reason = rest.partition(" ")
    return (int(number), reason) if word == _LOST and number.lstrip("-").isdigit() else None
