"""Runs what a client can do and prints what came back: JSON, one entry per feature.

Imported by the scripts beside it, under whatever interpreter runs them: standard library only.
"""

import asyncio
import base64
import inspect
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[3] / "launcher" / "demo"
PICTURE = DEMO / "picture.png"
SIGN = DEMO / "samples" / "sign.png"
URL = sys.argv[1] if len(sys.argv) > 1 else ""

CAPTION = "What is shown in this image?"
COUNT = "How many shapes are there?"
COLOR = "What color is the star?"

COLOR_SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"type": "string", "enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "note_color",
        "description": "Notes the color of a shape.",
        "parameters": COLOR_SCHEMA,
    },
}
NAMED_TOOL = {"type": "function", "function": {"name": "note_color"}}


def encoded(picture: Path = PICTURE) -> str:
    """The picture in base64."""
    return base64.b64encode(picture.read_bytes()).decode()


def data_uri(picture: Path = PICTURE) -> str:
    return "data:image/png;base64," + encoded(picture)


def prompt(question: str, picture: Path = PICTURE) -> str:
    """A native prompt about a picture."""
    return f"<image>{encoded(picture)}</image>\n{question}"


def messages(question: str, picture: Path = PICTURE) -> Any:
    """A conversation about a picture."""
    image = {"type": "image_url", "image_url": {"url": data_uri(picture)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def raised(call: Callable[[], Any]) -> dict[str, str]:
    """What a call that must fail raised, as its user sees it."""
    try:
        result = call()
        if not isinstance(result, str) and hasattr(result, "__iter__"):
            list(result)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "nothing", "message": ""}


def report(packages: Any, features: dict[str, Callable[[], Any]]) -> None:
    """Call every feature and print versions and results; one that raises says what."""
    seen = {}
    for name, call in features.items():
        try:
            result = call()
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
            seen[name] = {"result": result}
        except Exception as error:
            seen[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    versions = {package: version(package) for package in packages}
    print(json.dumps({"versions": versions, "features": seen}))
