"""The Triton kernels on NVIDIA GPUs; a file of its own, so that others need no Triton."""

from functools import cached_property

from tessera.shard.backends.cuda import CudaDevice
from tessera.shard.backends.triton_backend import TritonBackend, float8_works

FLOAT8_CAPABILITY = (8, 9)  # Ada; older ones do not convert such numbers


class TritonCudaBackend(CudaDevice, TritonBackend):
    """See `Backend`."""

    @cached_property
    def float8_cache(self) -> bool:  # type: ignore[override]
        """See `Backend.float8_cache`. Tried when it is asked for."""
        return self.capability >= FLOAT8_CAPABILITY and float8_works(self)
