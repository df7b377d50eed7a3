"""The native API's prompt string, taken apart into text and pictures.

Two spellings of a picture are read: `<image>DATA</image>` and markdown's `![alt](ADDRESS)`. What
each address holds is not looked at here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

IMAGE_TOKEN = "<image>"
"""How users write the place of a picture, whatever the model's own token is called."""

# Possessive quantifiers and character classes that end at the next opening bracket: each character
# is looked at a bounded number of times, so 20 MB of "![![" cost no more than 20 MB of text.
_PICTURE = re.compile(
    r"<image>([^<]*+)</image>"
    r"|!\[([^\[\]]*+)\]\(([^()]*+(?:\([^()]*+\)[^()]*+)*+)\)"
)
_SCHEME = re.compile(r"\s*+[A-Za-z][A-Za-z0-9+.-]*+:")


@dataclass(frozen=True, slots=True)
class TextPart:
    """Words of the prompt."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture written into the prompt."""

    source: str = field(repr=False)  # data URI, base64, URL or path
    overview_only: bool = False  # lay it out without tiles


Part = TextPart | ImagePart


def parse_inputs(inputs: str) -> list[Part]:
    """Split a prompt at the pictures written into it; takes time linear in its length.

    `<image>...</image>` always holds a picture. `![](...)` does too, as in
    text-generation-inference; with alternative text it does only if the address has a scheme, so
    that a prompt may speak about `![logo](logo.png)`.

    Returns:
        The parts in order; neighbouring text parts joined, empty ones left out.
    """
    parts: list[Part] = []
    end = 0
    for match in _pictures(inputs):
        if match.start() > end:
            parts.append(TextPart(inputs[end : match.start()]))
        parts.append(ImagePart(match[1] if match[1] is not None else match[3]))
        end = match.end()
    if end < len(inputs):
        parts.append(TextPart(inputs[end:]))
    return parts


def count_pictures(inputs: str) -> int:
    """How many pictures `parse_inputs` would find; keeps none of them."""
    return sum(1 for _ in _pictures(inputs))


def _pictures(inputs: str) -> Iterator[re.Match[str]]:
    for match in _PICTURE.finditer(inputs):
        if not match[2] or _SCHEME.match(match[3]):
            yield match
