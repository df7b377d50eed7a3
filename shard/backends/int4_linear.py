"""Linear layers with 4-bit weights by torch's own GPU kernel ("tinygemm").

torch has it for CUDA, as of now; elsewhere the operations refuse. Their names begin with an
underscore, so they are tried on the device before they are used. Never run on hardware.

The kernel reads and widens the whole weight anew for every 16 rows of input. For many rows the
weight is therefore made floats, once, from the kernel's own layout, and multiplied as those are.

Letters: O outputs, I inputs, G groups of inputs, C columns of a group; X bytes of the layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.quantized import GROUP, QuantizedWeight, quantize

BITS = 4
ROWS = 8  # of a weight, the kernel takes at once: it must have a multiple
TILE = 16  # columns; as many tiles as possible lie together
# Of input, up to which reading it again and again takes less time than making floats. Reckoned for
# Hopper and not measured: 40 TFLOP/s of the kernel against 17 bytes for each weight.
FEW_ROWS = 64


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
        few = 0 < x_TI.shape[0] <= FEW_ROWS
        product = self._by_the_kernel if few else self._by_floats
        out_TO = product(x_TI.bfloat16()).to(x_TI.dtype)
        return out_TO if self._bias_O is None else out_TO + self._bias_O

    def _by_the_kernel(self, x_TI: Tensor) -> Tensor:
        out_TO: Tensor = torch.ops.aten._weight_int4pack_mm(
            x_TI.contiguous(), self._packed, GROUP, self._of_groups_GO2
        )
        return out_TO

    def _by_floats(self, x_TI: Tensor) -> Tensor:
        codes_OI = unpacked(self._packed)
        weights_OGC = codes_OI.view(codes_OI.shape[0], -1, GROUP).bfloat16()
        scales_OG, offsets_OG = self._of_groups_GO2.transpose(0, 1).unbind(-1)
        # In place, and rounded once: as the kernel widens them.
        torch.addcmul(offsets_OG[..., None], weights_OGC, scales_OG[..., None], out=weights_OGC)
        return F.linear(x_TI, weights_OGC.flatten(1))


def unpacked(packed: Tensor) -> Tensor:
    """What the kernel's layout holds: code - 8 in int8, [O, I].

    The layout is [O / 8, I / (16 * tiles), 32, tiles / 2] words of 32 bits. Each holds 8 codes of
    one row; four neighbours of the 32 hold the row's 32 columns, two of each 8 together.
    """
    blocks, parts, _, words = packed.shape
    # Rows of a block, neighbours, words; the bytes of a word are of even columns, then of odd ones.
    bytes_X = packed.view(torch.uint8).view(blocks, parts, ROWS, 4, words, 2, 2)
    codes = torch.stack((bytes_X & 15, bytes_X >> 4), dim=-1).view(torch.int8).sub_(8)
    codes_OI = codes.permute(0, 2, 1, 4, 6, 7, 3, 5)
    return codes_OI.reshape(blocks * ROWS, -1)


def fits(weight: QuantizedWeight) -> bool:
    """Whether the kernel can take it."""
    return weight.bits == BITS and weight.shape[0] % ROWS == 0


def int4_works(device: torch.device) -> bool:
    """Whether this torch on this device multiplies with such weights rightly, few rows and many."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = (torch.randn(rows, 256, generator=generator) for rows in (48, FEW_ROWS + 1))
    weight = quantize(weight_OI, BITS)
    expected = F.linear(x_TI, weight.dequantize(torch.float32))
    try:
        linear = Int4Linear(weight.to(device), None)
        out = torch.cat([linear(x_TI[:3].to(device)), linear(x_TI.to(device))]).cpu()
    except (RuntimeError, AttributeError):  # the operation refused, or is gone from torch
        return False
    return torch.allclose(out, torch.cat([expected[:3], expected]), rtol=5e-2, atol=0.4)
