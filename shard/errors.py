"""Every failure a shard reports.

ShardError
  CheckpointError    the files and the model disagree; the process does not start
  DeviceError        the device is absent, too small or cannot do what was asked
  DivergenceError    router and shard, or two ranks, disagree about what is running
  GroupLost          ranks can no longer exchange tensors
  PartFailed         part of a step failed on some rank, and all ranks know
"""

import torch


class ShardError(Exception):
    """A failure with a message that says what to change."""


class CheckpointError(ShardError):
    """The checkpoint cannot be used. The message names the file, key or tensor."""


class DeviceError(ShardError):
    """The device cannot serve this model as configured."""


class DivergenceError(ShardError):
    """The two ends of the step stream disagree; the rank must be restarted."""


class GroupLost(ShardError):
    """An exchange between ranks failed; every rank must be restarted."""


class PartFailed(ShardError):
    """Work of a group failed on some rank. The same is raised on every rank."""

    def __init__(self, *, out_of_memory: bool) -> None:
        super().__init__("a rank of the group failed; its log has the cause")
        self.out_of_memory = out_of_memory


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no room for a tensor; on this rank or another."""
    if isinstance(error, PartFailed):
        return error.out_of_memory
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # What torch says of the host's memory, of memory pinned there or taken by a recording, of
    # cuBLAS.
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
