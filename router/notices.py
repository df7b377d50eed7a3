"""How a reply tells what was done differently than asked: key `warnings`, header `x-warnings`."""

from collections.abc import Sequence
from typing import Any

from tessera.router.ticket import Generation

HEADER = "x-warnings"


def warnings_of(generations: Sequence[Generation]) -> list[str]:
    """The sentences of all requests in order, each once."""
    sentences = [one for generation in generations for one in generation.request.warnings]
    return list(dict.fromkeys(sentences))


def warnings_field(generations: Sequence[Generation]) -> dict[str, Any]:
    """What to add to a reply, or to the last event of a stream; nothing if there is no warning."""
    sentences = warnings_of(generations)
    return {"warnings": sentences} if sentences else {}


def warnings_header(generations: Sequence[Generation]) -> dict[str, str]:
    """One line of ASCII: the first warning, and how many more the reply has."""
    sentences = warnings_of(generations)
    if not sentences:
        return {}
    first = " ".join(sentences[0].split()).encode("ascii", "replace").decode()
    others = len(sentences) - 1
    return {HEADER: f"{first} ({others} more in `warnings`)" if others else first}
