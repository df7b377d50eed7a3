"""Which numbers a model computes in."""

from collections.abc import Mapping
from typing import Any

import torch

from tessera.shard.backends.base import Backend
from tessera.shard.errors import CheckpointError, DeviceError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

CACHE_DTYPES: Mapping[str, torch.dtype] = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def resolve_dtype(setting: str, config: Mapping[str, Any], device_type: str) -> torch.dtype:
    """The dtype to compute in.

    Args:
        setting: "float32", "bfloat16", "float16", or "auto": what config.json says of the whole
            model, else of its text model, else float32. The hub's float16 becomes bfloat16 on
            the cpu, which has no fast float16 arithmetic.
        device_type: "cpu", "cuda" or "xpu".

    Raises:
        CheckpointError: config.json names a dtype that models are not computed in.
        DeviceError: `setting` is no dtype, or one this device cannot do.
    """
    if setting == "auto":
        dtype = _checkpoint_dtype(config)
        on_cpu = device_type == "cpu" and dtype is torch.float16
        return torch.bfloat16 if on_cpu else dtype
    if setting not in DTYPES:
        raise DeviceError(f"dtype {setting!r} is not known; use auto, {', '.join(DTYPES)}")
    if device_type == "cpu" and setting == "float16":
        raise DeviceError("the cpu has no fast float16; use bfloat16, float32 or auto as DTYPE")
    return DTYPES[setting]


def resolve_cache_dtype(setting: str, backend: Backend) -> torch.dtype | None:
    """The dtype of the KV cache; None: that of the model.

    Args:
        setting: "auto" or a key of `CACHE_DTYPES`.

    Raises:
        DeviceError: the backend has no such cache.
    """
    if setting == "auto":
        return None
    if not backend.float8_cache:
        raise DeviceError(
            f"KV_CACHE_DTYPE={setting} is not available with BACKEND={backend.name}; leave it at "
            "auto, or set BACKEND to reference, which is slower"
        )
    return CACHE_DTYPES[setting]


def _checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    text = config.get("text_config") or {}
    places = ((part, key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    name = next((part[key] for part, key in places if part.get(key)), "float32")
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"config.json says dtype={name!r}; set DTYPE to float32 or bfloat16")
    return dtype
