"""Fixtures every test may use."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("next-mistral")` is the folder of that tiny checkpoint; read it, don't write."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else checkpoints.make(kind, path)

    return folder
