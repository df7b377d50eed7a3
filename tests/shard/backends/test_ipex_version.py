"""When IPEX is used, told without it: it cannot be imported beside this torch."""

import sys

import pytest
import torch

from tessera.shard.backends import ipex_version, load_backend, xpu
from tessera.shard.backends.ipex_version import ipex_fits
from tessera.shard.backends.xpu import XpuBackend
from tessera.shard.errors import DeviceError
from tests.shard.backends.simulated_xpu import simulated_xpu

PACKAGE = "intel_extension_for_pytorch"


def install(monkeypatch: pytest.MonkeyPatch, ipex: str, torch: str) -> None:
    """Let these versions be what is installed; whoever imports IPEX fails as with the real one."""
    versions = {ipex_version.PACKAGE: ipex, "torch": torch}
    monkeypatch.setattr(ipex_version, "version_of", versions.__getitem__)
    monkeypatch.setitem(sys.modules, PACKAGE, None)


@pytest.mark.parametrize(
    ("ipex", "torch", "on_cpu", "on_xpu"),
    [
        ("2.8.0", "2.8.0", True, False),
        ("2.8.0", "2.8.0+cu128", True, False),
        ("2.8.10+xpu", "2.8.0+xpu", True, True),
        ("2.8.0", "2.8.0+xpu", True, False),
        ("2.8.0", "2.13.0", False, False),
        ("2.8.10+xpu", "2.13.0+xpu", False, False),
        ("2.7.0", "2.7.0", False, False),
        ("", "2.8.0", False, False),
        ("", "2.13.0+cpu", False, False),
    ],
)
def test_versions_decide(
    monkeypatch: pytest.MonkeyPatch, ipex: str, torch: str, on_cpu: bool, on_xpu: bool
) -> None:
    install(monkeypatch, ipex, torch)
    assert (ipex_fits("cpu"), ipex_fits("xpu")) == (on_cpu, on_xpu)


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert ipex_version.version_of("tessera-no-such-package") == ""
    assert ipex_version.version_of("torch") == torch.__version__


def test_asked_for_in_vain_it_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.8.0", "2.13.0+cpu")
    with pytest.raises(DeviceError) as refused:
        load_backend("cpu", "ipex")
    assert str(refused.value) == (
        "BACKEND=ipex on cpu needs intel-extension-for-pytorch 2.8 and torch 2.8; "
        "installed are intel-extension-for-pytorch 2.8.0 and torch 2.13.0+cpu"
    )


def test_on_a_gpu_it_must_be_built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.8.0", "2.8.0+xpu")
    with simulated_xpu(), pytest.raises(DeviceError, match=r"both built for GPUs \(\+xpu\)"):
        load_backend("xpu", "ipex")


@pytest.mark.parametrize("ipex", ["", "2.8.10+xpu"])
def test_beside_another_torch_a_gpu_never_imports_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ipex: str
) -> None:
    install(monkeypatch, ipex, "2.13.0+xpu")
    monkeypatch.setitem(sys.modules, "tessera.shard.backends.triton_backend", None)
    with simulated_xpu() as device:
        assert type(xpu.create(device)) is XpuBackend
    assert not any("IPEX" in message for message in caplog.messages)


def test_what_cannot_be_imported_is_told_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "2.8.10+xpu", "2.8.0+xpu")
    monkeypatch.setitem(sys.modules, "tessera.shard.backends.triton_backend", None)
    with simulated_xpu() as device:
        assert type(xpu.create(device)) is XpuBackend
    assert "IPEX cannot be imported" in caplog.messages
