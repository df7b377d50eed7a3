"""Which numbers a model computes in."""

from collections.abc import Mapping
from typing import Any

import torch

from tessera.shard.errors import CheckpointError, DeviceError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
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


def _checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    text = config.get("text_config") or {}
    places = ((part, key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    name = next((part[key] for part, key in places if part.get(key)), "float32")
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"config.json says dtype={name!r}; set DTYPE to float32 or bfloat16")
    return dtype
