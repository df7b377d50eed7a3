"""What every client must hear about the demo's pictures, and the forms guided answers must have."""

import json
import re
from typing import Any

CAPTION = "What is shown in this image?"
CAPTION_WORDS = {"red", "circle", "blue", "star", "green", "triangle", "white", "background"}
GREETING = "Hello! Send me an image and ask about it."
STAR = {"red", "green", "blue"}


def is_caption(text: str) -> bool:
    """Whether the text names everything in picture.png."""
    return set(re.findall(r"[a-z]+", text.lower())) >= CAPTION_WORDS


def is_three(text: str) -> bool:
    return text.strip() == "Three."


def is_blue(text: str) -> bool:
    return text.strip() == "Blue."


def is_star(value: Any) -> bool:
    """Whether a value, or the JSON text of one, has the form of `COLOR_SCHEMA`."""
    star = json.loads(value) if isinstance(value, str) else value
    return (
        star["color"] in STAR
        and type(star["count"]) is int
        and 1 <= star["count"] <= 9
        and set(star) <= {"color", "count", "type"}
    )
