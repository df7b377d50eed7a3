"""Fixtures every test may use."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import checkpoints

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("next-mistral")` is the folder of that tiny checkpoint; read it, don't write."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else checkpoints.make(kind, path)

    return folder


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium; asyncio cannot be run in the thread of a module that has it."""
    from tests.browser import chromium

    with chromium() as browser:
        yield browser
