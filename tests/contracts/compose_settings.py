"""Writes the settings that a server gets into docker/compose.yaml; `make docs` runs it."""

import textwrap
from pathlib import Path

from tessera.launcher.settings import CLASSES
from tessera.proto.env import fields_of

COMPOSE = Path(__file__).parents[2] / "docker" / "compose.yaml"
BEGIN, END = "    # Settings: written by `make docs`.\n", "    # End of the settings.\n"
ELSEWHERE = {"PORT", "HOSTNAME", "DEVICE", "ENV_FILE"}  # the image's, the engine's, compose's
HUB = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
WIDTH = 100


def with_settings(text: str) -> str:
    """`text` with the names of all settings between the markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    words = ", ".join(names())
    lines = textwrap.fill(words, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f"{before}{BEGIN}{lines},\n{END}{after}"


def names() -> list[str]:
    """The variables, each once, in the order of README's table."""
    found = [
        name
        for cls in CLASSES
        for field, _, spec in fields_of(cls)
        if not spec.internal
        for name in (field.upper(), *spec.aliases)
    ]
    return [name for name in dict.fromkeys((*found, *HUB)) if name not in ELSEWHERE]


if __name__ == "__main__":
    COMPOSE.write_text(with_settings(COMPOSE.read_text()))
