"""Draws of tokens from counted random numbers: a pure function of (seed, position, token id).

So a seeded request gives the same text alone, in any batch, after a preemption and on any number of
ranks. Gumbel-max: argmax(score - log(-log(u))) is a draw from softmax(scores).

Letters: R rows, V vocabulary. A key is a signed 64-bit integer.
"""

import torch
from torch import Tensor

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(seed: int, position: int) -> int:
    """What the random numbers of the token at a position are made of."""
    return signed(_mix((_mix(seed) + GOLDEN * (position + 1)) & MASK64))


def draw(scores_RV: Tensor, keys_R: Tensor) -> Tensor:
    """A token id for each row: int64 [R].

    Args:
        scores_RV: float32; -inf where a token must not be drawn.
        keys_R: int64, on the same device.
    """
    # On a processor a row stays in its caches; elsewhere each operation costs a launch.
    rows_at_once = 1 if scores_RV.device.type == "cpu" else max(1, scores_RV.shape[0])
    parts = zip(
        torch.split(scores_RV, rows_at_once), torch.split(keys_R, rows_at_once), strict=True
    )
    drawn = [
        (scores.double() - (-uniforms(keys, scores.shape[1]).log()).log()).argmax(dim=-1)
        for scores, keys in parts
    ]
    return torch.cat(drawn)


def uniforms(keys_R: Tensor, num_ids: int) -> Tensor:
    """One float64 in (0, 1) per key and token id: [R, num_ids].

    Source: the finaliser of splitmix64 (Steele, Lea, Flood 2014), one counter value per token id.
    """
    z = torch.arange(1, num_ids + 1, dtype=torch.int64, device=keys_R.device)
    z = z * signed(GOLDEN) + keys_R[:, None]
    z = (z ^ _shift(z, 30)) * signed(MIX_1)
    z = (z ^ _shift(z, 27)) * signed(MIX_2)
    z = z ^ _shift(z, 31)
    return (_shift(z, 12).double() + 0.5) * 2.0**-52


def signed(value: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned one."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: int) -> int:
    value = (value + GOLDEN) & MASK64
    value = ((value ^ (value >> 30)) * MIX_1) & MASK64
    value = ((value ^ (value >> 27)) * MIX_2) & MASK64
    return value ^ (value >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only has as an arithmetic one."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
