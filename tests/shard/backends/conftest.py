"""The simulated GPU for tests of all backends, and which tests need packages of their own."""

from collections.abc import Iterator
from typing import cast

import pytest

from tessera.shard.backends.base import Backend
from tessera.shard.backends.ipex_version import ipex_fits
from tessera.shard.backends.xpu import XpuBackend
from tests.shard.backends.pool import HostFaced
from tests.shard.backends.simulated_xpu import simulated_xpu

# `make test-ipex` runs the one where IPEX and its torch are installed: they cannot be beside
# another, and that torch cannot simulate a device.
SIMULATED = ["test_ipex_version.py", "test_ipex_gpu_build.py"]
collect_ignore = SIMULATED if ipex_fits("cpu") else ["test_ipex.py"]


@pytest.fixture
def xpu_backend() -> Iterator[Backend]:
    """The backend of Intel GPUs on a simulated one, for tests whose tensors are on the host."""
    with simulated_xpu() as device:
        yield cast(Backend, HostFaced(XpuBackend(device)))
