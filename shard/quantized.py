"""Weights of 4 or 8 bits: how they are made from floats, and the one layout they are kept in.

A weight is scale * code + least. Scale and least belong to a group of 32 columns of a row (the
scheme of llama.cpp's Q4_1), so AWQ's and GPTQ's groups of 32, 64 or 128 fit in unchanged.

Letters: O outputs, I inputs, G groups of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
OUT = 16  # rows of a block of the packed layout


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [O, I] in codes of `bits` bits."""

    bits: int  # 4 or 8
    codes_OI: Tensor  # uint8, one code each, below 2 ** bits
    scales_OG: Tensor  # float16
    least_OG: Tensor  # float16

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.codes_OI.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix as floats."""
        codes_OGC = self.codes_OI.unflatten(1, (-1, GROUP)).float()
        values_OGC = codes_OGC * self.scales_OG[..., None] + self.least_OG[..., None]
        return values_OGC.flatten(1).to(dtype)


def can_quantize(weight_OI: Tensor) -> bool:
    """Whether the inputs come out even in groups."""
    return weight_OI.shape[1] % GROUP == 0


def quantize(weight_OI: Tensor, bits: int) -> QuantizedWeight:
    """Round each weight to the nearest of 2 ** bits values between the least and largest of its
    group.

    Args:
        weight_OI: floats, finite; `can_quantize` holds.
    """
    groups_OGC = weight_OI.float().unflatten(1, (-1, GROUP))
    least_OG, most_OG = groups_OGC.amin(-1), groups_OGC.amax(-1)
    # Codes are chosen for the values as they will be read: in half precision.
    least_OG = least_OG.half()
    scales_OG = ((most_OG - least_OG.float()) / (2**bits - 1)).half()
    steps_OG = scales_OG.float().clamp(min=torch.finfo(torch.float16).tiny)
    codes_OGC = ((groups_OGC - least_OG.float()[..., None]) / steps_OG[..., None]).round_()
    codes_OI = codes_OGC.clamp_(0, 2**bits - 1).flatten(1).to(torch.uint8)
    return QuantizedWeight(bits, codes_OI, scales_OG, least_OG)


def pack(weight: QuantizedWeight) -> Tensor:
    """The bytes that `backends/csrc/quantized.h` reads: [blocks of 16 rows, G, bytes of a group]."""
    rows, columns = weight.shape
    missing = -rows % OUT
    codes_OI = torch.nn.functional.pad(weight.codes_OI, (0, 0, 0, missing))
    blocks, groups = codes_OI.shape[0] // OUT, columns // GROUP
    quads = codes_OI.view(blocks, OUT, groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if weight.bits == 4:
        low, high = quads.chunk(2, dim=2)
        quads = low | (high << 4)
    parts = [quads.reshape(blocks, groups, -1)]
    for of_group_OG in (weight.scales_OG, weight.least_OG):
        padded_OG = torch.nn.functional.pad(of_group_OG, (0, 0, 0, missing))
        by_block = padded_OG.view(blocks, OUT, groups).transpose(1, 2).contiguous()
        parts.append(by_block.view(torch.uint8))
    return torch.cat(parts, dim=-1)
