"""Tokens that a device has chosen and the host has not read: what stands for them in lists of ids.

A device that runs ahead of the host is given the next step before the host knows the tokens of
this one. In their places are negative numbers, which the device replaces.
"""

import torch
from torch import Tensor


def placeholder(row: int) -> int:
    """What stands for the token of a row of the step that was launched last."""
    return -1 - row


def is_placeholder(token_id: int) -> bool:
    """Whether it stands for a token."""
    return token_id < 0


def resolved(ids: Tensor, chosen_R: Tensor | None) -> Tensor:
    """The ids with the tokens in the places of what stands for them. Waits for nothing.

    Args:
        ids: int64.
        chosen_R: int64, on the same device, the tokens of the step that was launched last; None:
            there is no placeholder among the ids.
    """
    if chosen_R is None:
        return ids
    return torch.where(ids < 0, chosen_R[(-1 - ids).clamp(min=0)], ids)
