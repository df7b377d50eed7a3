"""Host tensors to the device without waiting for it."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; what kernels may assume of the start of a tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`; the host does not wait until it has arrived."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same on `device`, all by one copy: each one alone costs as much as a small kernel."""
    if device.type == "cpu":
        return list(tensors)
    ends = list(accumulate(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors))
    # Pinned memory that torch keeps for this; it is not used again before the copy has ended.
    staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    _place(staging, tensors, ends)
    return _placed(staging.to(device, non_blocking=True), tensors, ends)


def _place(packed: Tensor, tensors: Sequence[Tensor], ends: Sequence[int]) -> None:
    for view, tensor in zip(_placed(packed, tensors, ends), tensors, strict=True):
        view.copy_(tensor)


def _placed(packed: Tensor, like: Sequence[Tensor], ends: Sequence[int]) -> list[Tensor]:
    """The parts of `packed` as tensors of the shapes and dtypes of `like`."""
    starts = [0, *ends[:-1]]
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=True)
    ]
