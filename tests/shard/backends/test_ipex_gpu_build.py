"""What IPEX's build for GPUs is given, on a simulated one: it has never run on hardware."""

from collections.abc import Iterator

import pytest
import torch

from tessera.shard.backends.base import CacheShape, LayerCache
from tessera.shard.backends.ipex import IpexXpuBackend
from tessera.shard.backends.trial import agrees
from tests.shard.backends import stand_in_ipex
from tests.shard.backends.pool import Pool, moved
from tests.shard.backends.simulated_device import simulated_device
from tests.shard.backends.simulated_xpu import simulated_xpu


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[IpexXpuBackend]:
    """The backend over the documented functions of the build for GPUs, on a simulated one."""
    stand_in_ipex.install(monkeypatch)
    with simulated_xpu() as device:
        yield IpexXpuBackend(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_build_for_gpus_is_given_what_it_takes(
    gpu_build: IpexXpuBackend, dtype: torch.dtype
) -> None:
    """In float32 too, where attention is torch's own."""
    assert agrees(gpu_build, dtype, 5e-2)


def test_its_cache_has_positions_before_heads_in_memory(gpu_build: IpexXpuBackend) -> None:
    (cache,) = gpu_build.new_cache(CacheShape(1, 2, 24, 4, torch.bfloat16), 5)
    assert cache.k_BKPH.shape == cache.v_BKPH.shape == (5, 2, 4, 24)
    assert cache.k_BKPH.transpose(1, 2).is_contiguous()


def test_blocks_that_intel_has_not_tried_are_torchs(gpu_build: IpexXpuBackend) -> None:
    def caches(block_size: int) -> list[LayerCache]:
        return gpu_build.new_cache(CacheShape(1, 2, 64, block_size, torch.bfloat16), 4)

    assert [gpu_build._attends(caches(size)[0]) for size in (8, 16, 20, 64)] == [False, True] * 2


def test_wrong_results_of_the_build_for_gpus_are_noticed(
    gpu_build: IpexXpuBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_build._functions, "rms_norm", lambda x, weight, eps: x * weight)
    assert not agrees(gpu_build, torch.bfloat16, 5e-2)
    assert "kernels for simulated:0 give wrong results" in caplog.messages


def test_layers_wait_for_nothing(gpu_build: IpexXpuBackend) -> None:
    """But for the stand-in's own attention, which reads lengths."""
    (cache,) = gpu_build.new_cache(CacheShape(1, 2, 16, 16, torch.bfloat16), 5)
    layout = moved(Pool([20], (4, 2, 16), torch.bfloat16).layout([(0, 0, 20)]), gpu_build.device)
    qkv_TF = torch.zeros(20, 8 * 16, dtype=torch.bfloat16, device=gpu_build.device)
    cos_sin_LH = torch.zeros(20, 16, device=gpu_build.device)
    weight_D = torch.ones(128, dtype=torch.bfloat16, device=gpu_build.device)
    with simulated_device().waits() as waits:
        normed_TF, _ = gpu_build.add_rms_norm(qkv_TF, qkv_TF, weight_D, 1e-5)
        gpu_build.rotate_and_store(normed_TF, cos_sin_LH, cache, layout)
    assert not waits
