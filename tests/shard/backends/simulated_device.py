"""An accelerator that is not there: it computes on the host, but its tensors are elsewhere.

Tensors report the device `simulated` and refuse to meet tensors of the host. Whatever would make
the host wait for a real device is noted: values that are read, copies from memory that is not
pinned. A copy to the host that nobody waits for holds garbage until the device is waited for.
torch lets such a device be written in Python, as its "private use" device.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

NAME = "simulated"
CPU = torch.device("cpu")
# What their results are, or how large, is known only when the device has computed them.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
}
GARBAGE = 0xA5  # each byte of what has not arrived
INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_"}


class MixedDevices(RuntimeError):
    """An operation was given tensors of the device and of the host."""


class SimulatedDevice:
    """What happens on the device. There is one, made by `simulated_device`."""

    def __init__(self) -> None:
        # Here, for the torch of IPEX does not have it yet.
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME)
        # Else torch makes tensors from lists where Python does not see it.
        torch._C._set_only_lift_cpu_tensors(True)
        self._library = torch.library.Library("_", "IMPL")
        self._library.fallback(self.compute, "PrivateUse1")
        self._counters: list[Counter[str]] = []
        self._under_way: list[tuple[Tensor, Tensor]] = []  # copies to the host: where to, what
        self.device = torch.device(NAME, 0)
        self.has_float64 = True

    def note_wait(self, cause: str) -> None:
        """The host waits for the device, which comes to the end of all it was given."""
        for target, values in self._under_way:
            target.copy_(values)
        self._under_way.clear()
        for counter in self._counters:
            counter[f"{_asking_file()}: {cause}"] += 1

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Count what the host waits for in the block, by file and cause."""
        counter: Counter[str] = Counter()
        self._counters.append(counter)
        try:
            yield counter
        finally:
            self._counters.remove(counter)

    def compute(self, operation: Any, *arguments: Any, **named: Any) -> Any:
        """Do on the host what was asked of the device; results are on the device."""
        name = operation.name()
        if _is_composite(operation):  # in inference mode torch leaves that to us
            return operation.decompose(*arguments, **named)
        if name == "aten::copy_":
            return self._copy_into(operation, *arguments, **named)
        if name == "aten::_to_copy":
            return self._copy(operation, *arguments, **named)
        given: dict[int, Tensor] = {}  # what works in place returns what it was given

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                _refuse_host(name, value)
                given[id(on_host(value))] = value
            return on_host(value)

        if name in WAITING or (name in INDEXING and _has_mask(arguments[1])):
            self.note_wait(name)
        result = operation(*_each(taken, arguments), **_each(taken, named))
        return _each(lambda x: given[id(x)] if id(x) in given else on_device(x), result)

    def _copy(self, operation: Any, source: Tensor, **named: Any) -> Any:
        target = torch.device(named.get("device") or source.device)
        copied: Tensor = operation(on_host(source), **_each(on_host, named))
        if target.type != NAME and named.get("non_blocking"):
            return self._arriving(copied)
        self._note_copy(source, target.type == NAME, **named)
        return on_device(copied) if target.type == NAME else copied

    def _arriving(self, values: Tensor) -> Tensor:
        """A tensor of the host that holds these values once the device is waited for."""
        target = torch.empty_like(values)
        target.view(torch.uint8).fill_(GARBAGE)
        self._under_way.append((target, values.clone()))
        return target

    def _copy_into(self, operation: Any, target: Tensor, source: Tensor, *rest: bool) -> Tensor:
        self._note_copy(source, isinstance(target, SimulatedTensor), non_blocking=any(rest))
        operation(on_host(target), on_host(source))
        return target

    def _note_copy(self, source: Tensor, is_there: bool, **named: Any) -> None:
        was_there = isinstance(source, SimulatedTensor)
        if was_there and not is_there and not named.get("non_blocking"):
            self.note_wait("copy to the host")
        if is_there and not was_there and not (named.get("non_blocking") and is_pinned(source)):
            self.note_wait("copy of pageable memory")


@cache
def simulated_device() -> SimulatedDevice:
    """The device; from the first call on, it stays known to torch in this process."""
    return SimulatedDevice()


class SimulatedTensor(Tensor):
    """A tensor of the device; its values are in `inner`, on the host."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        if inner.dtype == torch.float64 and not simulated_device().has_float64:
            raise RuntimeError("Required aspect fp64 is not supported on the device")
        with torch.inference_mode(False):  # views of older tensors could not be made otherwise
            made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device(NAME, 0),
            )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.inner})"

    def tolist(self) -> Any:
        """As any tensor's; torch refuses it to classes of their own."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls,
        operation: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        return simulated_device().compute(operation, *arguments, **(named or {}))


def on_host(value: Any) -> Any:
    """The tensor or device of the host that stands behind one of the device."""
    if isinstance(value, SimulatedTensor):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == NAME else value


def on_device(value: Any) -> Any:
    """A tensor as one of the device; anything else as it is."""
    return SimulatedTensor(value) if isinstance(value, Tensor) else value


def pin_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory be pinned, which needs a driver: what was pinned is remembered by its tensor."""
    plain_empty = torch.empty

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        copied = tensor.clone()
        copied.is_simulated_pinned = True  # type: ignore[attr-defined]
        return copied

    def empty(*size: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        made = plain_empty(*size, **named)
        return pinned(made) if pin_memory else made

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch, "empty", empty)


def is_pinned(tensor: Tensor) -> bool:
    """Whether it was pinned as `pin_memory` lets it be. Views of what was are not."""
    return hasattr(tensor, "is_simulated_pinned")


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with everything in its tuples, lists and mappings changed."""
    if isinstance(value, (tuple, list)):
        return type(value)([_each(change, item) for item in value])
    if isinstance(value, Mapping):
        return {key: _each(change, item) for key, item in value.items()}
    return change(value)


def _refuse_host(name: str, tensor: Tensor) -> None:
    # As on a GPU, a number may come from the host.
    if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0:
        raise MixedDevices(f"{name}: a tensor of shape {list(tensor.shape)} is on the host")


@cache
def _is_composite(operation: Any) -> bool:
    """Whether torch makes it of others, on every device alike."""
    return bool(operation._can_decompose())


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    """Whether a mask chooses elements, so that their number is known only afterwards."""
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _asking_file() -> str:
    """The innermost file on the stack that belongs neither to torch nor to the simulation."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if "/torch/" not in frame.filename and not file.name.startswith("simulated_"):
            return file.name
    return "?"
