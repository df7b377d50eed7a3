"""Writes the settings table into README.md: `python tests/contracts/readme.py` (or `make docs`)."""

from pathlib import Path

from tessera.launcher.settings import CLASSES
from tessera.proto.env import settings_table

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- settings: written by `make docs` -->\n", "<!-- /settings -->"


def with_settings_table(text: str) -> str:
    """`text` with everything between the markers replaced by the current table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{settings_table(*CLASSES)}{END}{after}"


if __name__ == "__main__":
    README.write_text(with_settings_table(README.read_text()))
