"""Every message in TROUBLESHOOTING.md is one that the code says, and every setting in it exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tessera.launcher.settings import CLASSES
from tessera.proto.env import environment_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "TROUBLESHOOTING.md").read_text()
MESSAGES = [
    row.split("` |")[0].removeprefix("| `").replace("\\`", "`")
    for row in PAGE.splitlines()
    if row.startswith("| `")
]
PLACEHOLDER = "…"


def text_of(node: ast.AST) -> str | None:
    """A string as far as the source tells; the rest is `PLACEHOLDER`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or PLACEHOLDER for part in node.values)
    return None


@cache
def said_by_the_code() -> list[str]:
    folders = ("launcher", "proto", "router", "shard")
    return [
        text for folder in folders for path in (ROOT / folder).rglob("*.py") for text in texts(path)
    ]


def texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if text := text_of(node):
            yield text


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_said_by_the_code(message: str) -> None:
    wanted = re.compile(".*?".join(map(re.escape, message.split(PLACEHOLDER))), re.DOTALL)
    assert any(wanted.search(text) for text in said_by_the_code())


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 40 and len(set(MESSAGES)) == len(MESSAGES)


def test_settings_exist() -> None:
    known = environment_names(*CLASSES) | {"TMPDIR"}
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})[`=]", PAGE))
    assert len(named) > 15 and named <= known, named - known
