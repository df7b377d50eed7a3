"""Settings of torch that every shard test runs under."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny and the machine is shared: more threads only wait for each other."""
    torch.set_num_threads(1)
