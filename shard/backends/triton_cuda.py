"""The Triton kernels on NVIDIA GPUs; a file of its own, so that others need no Triton."""

from tessera.shard.backends.cuda import CudaDevice
from tessera.shard.backends.triton_backend import TritonBackend


class TritonCudaBackend(CudaDevice, TritonBackend):
    """See `Backend`."""
