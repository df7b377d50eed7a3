"""One file per device; the file's name is the registration.

A backend file offers `available() -> bool` and `create(device: torch.device) -> Backend`.
Torch is imported when a backend is loaded, so that `build` also runs where there is none.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tessera.shard.errors import DeviceError

if TYPE_CHECKING:
    import torch

    from tessera.shard.backends.base import Backend

AUTO = "auto"
AUTO_ORDER = ("cuda", "xpu", "cpu")  # the first that is there


def load_backend(device: str, backend: str = AUTO) -> "Backend":
    """The operations of a device.

    Args:
        device: "cpu", "cuda", "xpu", with an index ("cuda:1") or without, or "auto".
        backend: a file's name in this folder; "auto": the one named like the device.

    Raises:
        DeviceError: the device or the file is absent. An asked-for device is never replaced.
    """
    import torch

    chosen = _resolve(device)
    if not _file(chosen.type).available():
        raise DeviceError(
            f"device {device!r} is not available: torch {torch.__version__} finds none here; "
            "check the driver and the torch build, or set the device to cpu"
        )
    created: Backend = _file(chosen.type if backend == AUTO else backend).create(chosen)
    return created


def _resolve(device: str) -> "torch.device":
    """The torch device of a name; the first one of a kind where no index is given."""
    import torch

    if device == AUTO:
        device = next(name for name in AUTO_ORDER if _file(name).available())
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise DeviceError(
            f"device {device!r} is not known; use auto, {', '.join(AUTO_ORDER)}"
        ) from None
    return parsed if parsed.type == "cpu" else torch.device(parsed.type, parsed.index or 0)


def _file(name: str) -> ModuleType:
    """The backend file of that name."""
    if name.isidentifier() and (Path(__file__).parent / f"{name}.py").is_file():
        module = importlib.import_module(f"{__name__}.{name}")
        if hasattr(module, "create"):
            return module
    raise DeviceError(f"backend {name!r} is not known: shard/backends has no such backend file")
