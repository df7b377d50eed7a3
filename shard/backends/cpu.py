"""CPUs."""

import torch

from tessera.shard.backends.reference import ReferenceBackend


def available() -> bool:
    """There is always a CPU."""
    return True


def create(device: torch.device) -> ReferenceBackend:
    """The backend of this host's processors."""
    return CpuBackend(device)


class CpuBackend(ReferenceBackend):
    """Reference operations for now."""

    name = "cpu"
