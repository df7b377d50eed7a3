"""The backend of Intel GPUs, without one: torch.xpu as it is, and as it would answer."""

import ast
import inspect
import logging
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tessera.shard import gumbel
from tessera.shard.backends import load_backend, xpu
from tessera.shard.backends.trial import agrees
from tessera.shard.backends.xpu import XpuBackend, XpuDevice
from tessera.shard.parallel import BACKENDS
from tests.shard.backends.simulated_device import simulated_device
from tests.shard.backends.simulated_xpu import (
    ALLOCATED_BYTES,
    COMPUTE_UNITS,
    FREE_BYTES,
    RESERVED_BYTES,
    STAND_INS,
    SimulatedEvent,
    simulated_xpu,
)

TREE = ast.parse(Path(xpu.__file__).read_text())
CALLS = [node for node in ast.walk(TREE) if isinstance(node, ast.Call)]
EVENT_METHODS = {"record", "synchronize", "elapsed_time"}


def torch_xpu_calls() -> list[ast.Call]:
    return [call for call in CALLS if ast.unparse(call.func).startswith("torch.xpu.")]


@pytest.mark.parametrize("call", torch_xpu_calls(), ids=ast.unparse)
def test_what_is_called_exists_and_takes_these_arguments(call: ast.Call) -> None:
    function = operator.attrgetter(ast.unparse(call.func).removeprefix("torch."))(torch)
    given = [None] * len(call.args), {str(keyword.arg): None for keyword in call.keywords}
    inspect.signature(function).bind(*given[0], **given[1])


def test_all_of_torch_xpu_is_called_by_its_full_name() -> None:
    """So that the test above sees it."""
    assert len(torch_xpu_calls()) >= 10
    names = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert {"mem_get_info", "memory_allocated", "synchronize"} <= names
    imported = [node for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)]
    assert not any("torch.xpu" in str(node.module) for node in imported)


def test_events_have_the_methods_that_are_called() -> None:
    called = {
        call.func.attr: call
        for call in CALLS
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.attr in EVENT_METHODS
    }
    assert set(called) == EVENT_METHODS
    for name, call in called.items():
        inspect.signature(getattr(torch.xpu.Event, name)).bind(None, *call.args)


def test_the_properties_of_a_device_are_documented() -> None:
    text = torch.xpu.get_device_properties.__doc__ or ""
    read = [node for node in ast.walk(TREE) if isinstance(node, ast.Attribute)]
    names = {x.attr for x in read if "get_device_properties" in ast.unparse(x.value)}
    assert names == vars(STAND_INS["get_device_properties"](None)).keys()
    assert all(f"``{name}``" in text for name in names)


def test_ranks_meet_over_what_torch_has_for_such_devices() -> None:
    assert BACKENDS["xpu"] == dist.Backend.default_device_backend_map["xpu"] == "xccl"


@pytest.fixture
def device() -> Iterator[torch.device]:
    with simulated_xpu() as device:
        yield device


def test_memory_that_torch_keeps_for_itself_is_free(device: torch.device) -> None:
    backend = XpuBackend(device)
    assert backend.free_memory_bytes() == FREE_BYTES + RESERVED_BYTES - ALLOCATED_BYTES
    assert backend.used_memory_bytes() == backend.peak_memory_bytes() == ALLOCATED_BYTES


def test_marks_wait_for_nothing_where_events_tell_time(device: torch.device) -> None:
    backend = XpuBackend(device)
    backend.mark()  # tries it
    with simulated_device().waits() as waits:
        first, last = backend.mark(), backend.mark()
    assert not waits
    assert backend.elapsed_ns(first, last) > 0


def test_marks_wait_where_events_tell_no_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SimulatedEvent, "tells_time", False)
    backend = XpuBackend(device)
    with simulated_device().waits() as waits, caplog.at_level(logging.WARNING):
        first, last = backend.mark(), backend.mark()
    assert waits["xpu.py: synchronize"] == 2
    assert backend.elapsed_ns(first, last) > 0
    assert [r.message for r in caplog.records] == [
        "events of simulated:0 tell no time: each step waits for its stages"
    ]


def test_without_float64_tokens_are_drawn_on_the_processor(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scores_RV = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    keys_R = torch.tensor([1, 2, 3])
    drawn = []
    for has_it in (True, False):
        monkeypatch.setattr(simulated_device(), "has_float64", has_it)
        backend = XpuBackend(device)
        with simulated_device().waits() as waits:
            ids_R = backend.draw(scores_RV.to(device), keys_R.to(device))
        assert ids_R.device == device
        assert (waits["xpu.py: copy to the host"] > 0) is not has_it
        drawn.append(ids_R.tolist())
    assert drawn[0] == drawn[1] == gumbel.draw(scores_RV, keys_R).tolist()
    assert caplog.messages == ["simulated:0 has no float64: the processor draws sampled tokens"]


def test_without_float64_kernels_can_still_be_tried(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_device(), "has_float64", False)
    assert agrees(XpuBackend(device), torch.bfloat16, 5e-2)


class Kernels(XpuDevice):
    """Stands in for the Triton backend, which cannot be imported without Triton."""

    def __init__(self, device: torch.device, units: int) -> None:
        self.device, self.units = device, units


@pytest.mark.parametrize("work", [True, False])
def test_triton_is_taken_where_it_is_right(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, work: bool
) -> None:
    triton_backend, triton_xpu = ModuleType("triton_backend"), ModuleType("triton_xpu")
    triton_backend.kernels_work = lambda backend: work  # type: ignore[attr-defined]
    triton_xpu.TritonXpuBackend = Kernels  # type: ignore[attr-defined]
    for module in (triton_backend, triton_xpu):
        monkeypatch.setitem(sys.modules, f"tessera.shard.backends.{module.__name__}", module)
    backend = xpu.create(device)
    assert type(backend) is (Kernels if work else XpuBackend)
    assert not isinstance(backend, Kernels) or backend.units == COMPUTE_UNITS


def test_without_triton_torchs_operations_are_right_everywhere(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tessera.shard.backends.triton_backend", None)
    with caplog.at_level(logging.WARNING):
        assert type(xpu.create(device)) is XpuBackend
    assert "Triton is not installed: computing with torch's slower operations" in caplog.messages


def test_the_device_of_a_rank_is_the_one_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setitem(sys.modules, "tessera.shard.backends.triton_backend", None)
    with simulated_xpu():
        monkeypatch.setattr("torch.xpu.set_device", chosen.append)
        assert load_backend("xpu:1").device == torch.device("xpu", 1)
    assert chosen == [torch.device("xpu", 1)]
