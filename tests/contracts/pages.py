"""The project's Markdown pages: where they are, their examples, what is generated into them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, API = ROOT / "README.md", ROOT / "API.md"
FOLDERS = (".", "docker", "benchmark", "launcher/demo")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The examples of a page in a language (a regular expression)."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def between(text: str, begin: str, end: str, table: str) -> str:
    """`text` with `table` instead of what is between its only `begin` and the `end` after it."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{table}{end}{after}"
