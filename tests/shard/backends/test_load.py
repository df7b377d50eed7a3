"""Which backend a device name gives."""

import operator
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tessera.shard.backends import cpu, cuda, load_backend, xpu
from tessera.shard.errors import DeviceError


def test_auto_is_the_cpu_where_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (cuda, xpu):
        monkeypatch.setattr(file, "available", lambda: False)
    assert load_backend("auto").device == torch.device("cpu")


def test_auto_prefers_cuda_then_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (cuda, xpu):
        monkeypatch.setattr(file, "available", lambda: True)
    monkeypatch.setattr(cuda, "create", cuda.CudaBackend)  # the real ones ask the driver
    monkeypatch.setattr(xpu, "create", xpu.XpuBackend)
    assert load_backend("auto").device == torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert load_backend("auto").name == "xpu"
    assert load_backend("xpu:3").device == torch.device("xpu", 3)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_an_absent_device_is_never_replaced(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (cuda, xpu):
        monkeypatch.setattr(file, "available", lambda: False)
    for backend in ("auto", "reference"):
        with pytest.raises(DeviceError, match=f"device '{device}' is not available"):
            load_backend(device, backend)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "reference", "../cpu"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(DeviceError, match="is not known"):
        load_backend(device)


@pytest.mark.parametrize("backend", ["triton", "base", "build", "__init__", "../cpu", ""])
def test_unknown_backends_are_refused(backend: str) -> None:
    with pytest.raises(DeviceError, match=f"backend '{backend}' is not known"):
        load_backend("cpu", backend)


def test_the_reference_can_be_asked_for() -> None:
    assert load_backend("cpu", "reference").name == "reference"
    assert load_backend("cpu", "cpu").name in (cpu.CpuBackend.name, "reference")


@pytest.mark.parametrize("file", [cuda, xpu])
def test_what_the_gpu_files_call_exists_in_this_torch(file: ModuleType) -> None:
    names = set(re.findall(r"torch\.((?:cuda|xpu)\.\w+)", Path(file.__file__ or "").read_text()))
    assert len(names) > 5
    for name in names:
        assert callable(operator.attrgetter(name)(torch))
