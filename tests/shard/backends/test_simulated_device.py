"""The simulated device: what it computes, what it refuses and what it counts."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.shard.backends.simulated_device import (
    MixedDevices,
    SimulatedDevice,
    pin_memory,
    simulated_device,
)


@pytest.fixture
def there() -> SimulatedDevice:
    return simulated_device()


def test_tensors_stay_on_the_device_through_computation(there: SimulatedDevice) -> None:
    x = torch.arange(12.0, device=there.device).view(3, 4)
    with torch.inference_mode():
        y = F.linear(x[1:].float().softmax(-1), x.bfloat16().float())
    assert y.device == there.device
    on_host = torch.arange(12.0).view(3, 4)
    expected = F.linear(on_host[1:].softmax(-1), on_host)
    assert torch.equal(y.cpu(), expected)


def test_what_works_in_place_changes_views_too(there: SimulatedDevice) -> None:
    pool = torch.zeros(4, 2, device=there.device)
    view = pool[1]
    pool[torch.tensor([1, 3], device=there.device)] = torch.ones(2, device=there.device)
    assert view.add_(1) is view
    assert pool.tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.ones(4) + x,
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: F.linear(x[None], torch.ones(2, 4)),
        lambda x: F.embedding(torch.tensor([0]), x[None]),
    ],
)
def test_devices_are_not_mixed(there: SimulatedDevice, mix: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(4, device=there.device)
    with pytest.raises(MixedDevices, match="is on the host"):
        mix(x)
    with torch.inference_mode(), pytest.raises(MixedDevices, match="is on the host"):
        mix(x)


@pytest.mark.parametrize(
    ("wait", "cause"),
    [
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "aten::_local_scalar_dense"),
        (lambda x: x.tolist(), "copy to the host"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x[x > 0], "aten::index.Tensor"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: torch.tensor([1, 2], device=x.device), "copy of pageable memory"),
        (lambda x: torch.ones(2).to(x.device, non_blocking=True), "copy of pageable memory"),
    ],
)
def test_waiting_is_counted(
    there: SimulatedDevice, wait: Callable[[Tensor], object], cause: str
) -> None:
    x = torch.ones(4, device=there.device)
    for mode in (False, True):
        with torch.inference_mode(mode), there.waits() as waits:
            wait(x)
        assert waits == {f"test_simulated_device.py: {cause}": 1}


def test_computing_and_copies_of_pinned_memory_wait_for_nothing(
    there: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_memory(monkeypatch)
    with there.waits() as waits:
        x = torch.ones(4).pin_memory().to(there.device, non_blocking=True)
        staging = torch.empty(4, pin_memory=True)
        y = staging.to(there.device, non_blocking=True)
        (x + y).masked_fill_(x > 0, 1.0).argmax(-1)
    assert not waits
    with there.waits() as waits:
        torch.ones(4).pin_memory().to(there.device)  # in this order, but blocking
    assert waits


def test_what_nobody_waited_for_is_garbage_on_the_host(there: SimulatedDevice) -> None:
    x = torch.arange(3, device=there.device)
    with there.waits() as waits:
        arriving = x.to("cpu", non_blocking=True)
        x += 10  # later than the copy
    assert not waits
    assert 1 not in arriving.tolist()
    there.note_wait("event")
    assert arriving.tolist() == [0, 1, 2]
