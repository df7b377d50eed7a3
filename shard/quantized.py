"""Weights of 4 or 8 bits: how they are made from floats, and the one layout they are kept in.

A weight is scale * (code - zero). Scale and zero point belong to a group of 32 columns of a row, so
AWQ's and GPTQ's groups of 32, 64 or 128 fit in without a change. Zero points are no integers here.

Letters: O outputs, I inputs, G groups of inputs, C columns of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
OUT = 16  # rows of a block of the packed layout
ROWS_AT_ONCE = 64  # while quantising: temporary floats stay in the caches
SMALLEST_SCALE = 2.0**-24  # above zero in half precision
# Of a group whose values lie close together but far from zero: half precision ends at 65504, and
# up to here a zero point is exact to half a code.
LARGEST_ZERO = 1024


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [O, I] in codes of `bits` bits."""

    bits: int  # 4 or 8
    codes_OI: Tensor  # uint8, one code each, below 2 ** bits
    scales_OG: Tensor  # float16
    zeros_OG: Tensor  # float16, in codes

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.codes_OI.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix as floats."""
        codes_OGC = self.codes_OI.view(*self.scales_OG.shape, GROUP).float()
        values_OGC = (codes_OGC - self.zeros_OG[..., None]) * self.scales_OG[..., None]
        return values_OGC.flatten(1).to(dtype)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same on a device."""
        tensors = (self.codes_OI, self.scales_OG, self.zeros_OG)
        return QuantizedWeight(self.bits, *(tensor.to(device) for tensor in tensors))


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several matrices of one width, in order; all of as many bits."""
    return QuantizedWeight(
        weights[0].bits,
        torch.cat([weight.codes_OI for weight in weights]),
        torch.cat([weight.scales_OG for weight in weights]),
        torch.cat([weight.zeros_OG for weight in weights]),
    )


def can_quantize(inputs: int) -> bool:
    """Whether they come out even in groups."""
    return inputs % GROUP == 0


def quantize(weight_OI: Tensor, bits: int) -> QuantizedWeight:
    """Round each weight to the nearest of 2 ** bits values between the least and largest of its
    group.

    Args:
        weight_OI: floats, finite; `can_quantize` holds for its inputs.
    """
    return stacked([_quantize_rows(part, bits) for part in torch.split(weight_OI, ROWS_AT_ONCE)])


def _quantize_rows(weight_OI: Tensor, bits: int) -> QuantizedWeight:
    groups_OGC = weight_OI.float().reshape(weight_OI.shape[0], -1, GROUP)
    least_OG, most_OG = groups_OGC.amin(-1), groups_OGC.amax(-1)
    largest_OG = torch.maximum(-least_OG, most_OG)
    scales_OG = torch.maximum((most_OG - least_OG) / (2**bits - 1), largest_OG / LARGEST_ZERO)
    scales_OG = scales_OG.clamp(min=SMALLEST_SCALE).half()
    # Zero points and codes are chosen for the numbers as they will be read: in half precision.
    steps_OG = scales_OG.float()
    zeros_OG = (-least_OG / steps_OG).half()
    codes_OGC = groups_OGC / steps_OG[..., None] + zeros_OG.float()[..., None]
    codes_OI = codes_OGC.round_().clamp_(0, 2**bits - 1).flatten(1).to(torch.uint8)
    return QuantizedWeight(bits, codes_OI, scales_OG, zeros_OG)


def pack(weight: QuantizedWeight) -> Tensor:
    """What `backends/csrc/quantized.h` reads: uint8 [blocks of 16 rows, G, bytes of a group]."""
    rows, columns = weight.shape
    missing = -rows % OUT
    codes_OI = F.pad(weight.codes_OI, (0, 0, 0, missing))
    blocks, groups = codes_OI.shape[0] // OUT, columns // GROUP
    quads = codes_OI.view(blocks, OUT, groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if weight.bits == 4:
        low, high = quads.chunk(2, dim=2)
        quads = low | (high << 4)
    parts = [quads.reshape(blocks, groups, -1)]
    for of_group_OG in (weight.scales_OG, weight.zeros_OG):
        padded_OG = F.pad(of_group_OG, (0, 0, 0, missing))
        by_block = padded_OG.view(blocks, OUT, groups).transpose(1, 2).contiguous()
        parts.append(by_block.view(torch.uint8))
    return torch.cat(parts, dim=-1)
