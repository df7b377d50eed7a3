"""Every failure a shard reports.

ShardError
  CheckpointError    the files and the model disagree; the process does not start
  DeviceError        the device is absent, too small or cannot do what was asked
  DivergenceError    router and shard, or two ranks, disagree about what is running
"""


class ShardError(Exception):
    """A failure with a message that says what to change."""


class CheckpointError(ShardError):
    """The checkpoint cannot be used. The message names the file, key or tensor."""


class DeviceError(ShardError):
    """The device cannot serve this model as configured."""


class DivergenceError(ShardError):
    """The two ends of the step stream disagree; the rank must be restarted."""
