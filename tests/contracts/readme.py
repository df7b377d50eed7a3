"""Writes settings and the image's numbers into README.md; `make docs` runs it."""

import json

from pages import README, ROOT, between

from tessera.launcher.settings import CLASSES
from tessera.proto.env import settings_table

IMAGE = ROOT / "benchmark" / "results" / "docker.json"
BEGIN, END = "<!-- settings: written by `make docs` -->\n", "<!-- /settings -->"


def with_settings_table(text: str) -> str:
    """`text` with everything between the markers replaced by the current table."""
    return between(text, BEGIN, END, settings_table(*CLASSES))


def with_image_numbers(text: str) -> str:
    """`text` with the image's size and start as they were measured."""
    found = json.loads(IMAGE.read_text())
    size, start = f"{found['above_base_mb']:.0f} MB", f"{found['start_s']['median']:.1f} s"
    text = between(text, "<!-- image -->", "<!-- /image -->", size)
    return between(text, "<!-- start -->", "<!-- /start -->", start)


if __name__ == "__main__":
    README.write_text(with_image_numbers(with_settings_table(README.read_text())))
