"""The Triton kernels on Intel GPUs; a file of its own, so that others need no Triton."""

from tessera.shard.backends.triton_backend import TritonBackend
from tessera.shard.backends.xpu import XpuDevice


class TritonXpuBackend(XpuDevice, TritonBackend):
    """See `Backend`."""
