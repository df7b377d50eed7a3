"""Tests that only a GPU can run; `make test-cuda` runs them and those of all backends."""

import pytest

from tessera.shard.backends import cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU all of them are skipped, with a reason that is shown."""
    if not cuda.available():
        for item in items:
            if "tests/cuda/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="NO GPU: the CUDA backend is not tested"))
