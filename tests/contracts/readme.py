"""Writes the tables into README.md: `python tests/contracts/readme.py` (or `make docs`)."""

import json
from itertools import groupby
from pathlib import Path

from tessera.launcher.settings import CLASSES
from tessera.proto.env import settings_table

README = Path(__file__).parents[2] / "README.md"
IMAGE = README.parent / "benchmark" / "results" / "docker.json"
COMPATIBILITY = README.parent / "tests" / "clients" / "compatibility.json"
BEGIN, END = "<!-- settings: written by `make docs` -->\n", "<!-- /settings -->"
CLIENTS_BEGIN, CLIENTS_END = "<!-- clients: written by `make docs` -->\n", "<!-- /clients -->"


def with_settings_table(text: str) -> str:
    """`text` with everything between the markers replaced by the current table."""
    return between(text, BEGIN, END, settings_table(*CLASSES))


def with_client_table(text: str) -> str:
    """`text` with what tests/clients saw working between its markers."""
    return between(text, CLIENTS_BEGIN, CLIENTS_END, _client_table())


def with_image_numbers(text: str) -> str:
    """`text` with the image's size and start as they were measured."""
    found = json.loads(IMAGE.read_text())
    size, start = f"{found['above_base_mb']:.0f} MB", f"{found['start_s']['median']:.1f} s"
    text = between(text, "<!-- image -->", "<!-- /image -->", size)
    return between(text, "<!-- start -->", "<!-- /start -->", start)


def between(text: str, begin: str, end: str, table: str) -> str:
    """`text` with `table` instead of what is between its only `begin` and the `end` after it."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{table}{end}{after}"


def _client_table() -> str:
    """One row per client; versions of which the same works share it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for seen in json.loads(COMPATIBILITY.read_text()):
        names, versions = ", ".join(seen["clients"]), ", ".join(seen["clients"].values())
        rows.setdefault((names, _calls(seen["works"])), []).append(versions)
    lines = ["| client | version | what works |", "| --- | --- | --- |"]
    lines += [f"| {name} | {', '.join(found)} | {calls} |" for (name, calls), found in rows.items()]
    return "\n".join(lines) + "\n"


def _calls(features: list[str]) -> str:
    """`call: variant` entries, grouped: "`call` (variant, variant)"."""
    pairs = [feature.partition(": ")[::2] for feature in features]
    pairs.sort(key=lambda pair: pair[0].lower())
    groups: list[str] = []
    for call, same in groupby(pairs, key=lambda pair: pair[0]):
        variants = ", ".join(variant for _, variant in same if variant)
        groups.append(f"`{call}` ({variants})" if variants else f"`{call}`")
    return ", ".join(groups)


if __name__ == "__main__":
    tables = with_client_table(with_settings_table(README.read_text()))
    README.write_text(with_image_numbers(tables))
