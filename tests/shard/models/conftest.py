"""Oracles and runners, made once: loading transformers and its models costs seconds."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.shard.models.driver import Runner, placement
from tests.shard.models.oracle import Oracle

# Where a GPU is, the router's packages may not be (`make test-cuda`).
collect_ignore = [] if find_spec("llguidance") else ["test_fitted_pictures.py"]


@pytest.fixture(scope="session")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[[str], Oracle]:
    """`oracle("llama")` is transformers' model of that checkpoint."""
    return cache(lambda kind: Oracle(checkpoint(kind)))


@pytest.fixture(scope="session")
def runner(checkpoint: Callable[[str], Path]) -> Callable[..., Runner]:
    """`runner("llama", "cpu")` is our model of that checkpoint on a backend, in float32."""
    return cache(lambda kind, backend="reference": Runner(checkpoint(kind), placement(backend)))
