"""Linear layers with 4-bit weights by torch's own GPU kernel ("tinygemm").

torch has it for CUDA, as of now; elsewhere the operations refuse. Their names begin with an
underscore, so they are tried on the device before they are used. Never run on hardware.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.quantized import GROUP, QuantizedWeight, quantize

BITS = 4
ROWS = 8  # of a weight, the kernel takes at once: it must have a multiple
TILE = 16  # columns; as many tiles as possible lie together


class Int4Linear:
    """The kernel computes in bfloat16: weights are (code - 8) * scale + offset."""

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None) -> None:
        """`weight`: for which `fits` holds."""
        tiles = next(count for count in (8, 4, 2) if weight.shape[1] % (count * TILE) == 0)
        codes_OI = weight.codes_OI
        pairs = (codes_OI[:, ::2] << 4) | codes_OI[:, 1::2]
        self._packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        scales_OG = weight.scales_OG.float()
        offsets_OG = (8 - weight.zeros_OG.float()) * scales_OG
        of_groups_OG2 = torch.stack((scales_OG, offsets_OG), dim=-1)
        self._of_groups_GO2 = of_groups_OG2.transpose(0, 1).bfloat16().contiguous()
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        out_TO: Tensor = torch.ops.aten._weight_int4pack_mm(
            x_TI.bfloat16().contiguous(), self._packed, GROUP, self._of_groups_GO2
        ).to(x_TI.dtype)
        return out_TO if self._bias_O is None else out_TO + self._bias_O


def fits(weight: QuantizedWeight) -> bool:
    """Whether the kernel can take it."""
    return weight.bits == BITS and weight.shape[0] % ROWS == 0


def int4_works(device: torch.device) -> bool:
    """Whether this torch on this device multiplies with such weights rightly."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = (torch.randn(rows, 128, generator=generator) for rows in (48, 3))
    weight = quantize(weight_OI, BITS)
    expected = F.linear(x_TI, weight.dequantize(torch.float32))
    try:
        out = Int4Linear(weight.to(device), None)(x_TI.to(device)).cpu()
    except (RuntimeError, AttributeError):  # the operation refused, or is gone from torch
        return False
    return torch.allclose(out, expected, rtol=5e-2, atol=0.4)
