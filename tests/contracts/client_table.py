"""Writes what works with which client into API.md; `make docs` runs it."""

import json
from itertools import groupby

from pages import API, ROOT, between

COMPATIBILITY = ROOT / "tests" / "clients" / "compatibility.json"
BEGIN, END = "<!-- clients: written by `make docs` -->\n", "<!-- /clients -->"


def with_client_table(text: str) -> str:
    """`text` with what tests/clients saw working between its markers."""
    return between(text, BEGIN, END, client_table())


def client_table() -> str:
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
    API.write_text(with_client_table(API.read_text()))
