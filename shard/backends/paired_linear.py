"""Linear layers in bfloat16 with weights in the order in which the CPU kernels read them.

The weight is cut into blocks of 64 outputs. A block holds pairs of columns, one after the other,
and of each pair the 64 outputs' two numbers: what one instruction multiplies lies together, and all
is read from front to back.
"""

import torch
from torch import Tensor

from tessera.shard.backends.huge_pages import HugePages

OUT = 64  # outputs of a block; PAIRED_OUT in csrc/kernels.h


class PairedLinear:
    """`F.linear` on bfloat16. A row's result has the same bits whatever other rows are there."""

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None, variant: int, memory: HugePages
    ) -> None:
        """Copies the weight.

        Args:
            weight_OI: bfloat16, with an even number of inputs.
            variant: number of the kernels, for which `paired_linear_pays`.
        """
        self.packed = pack(weight_OI, variant, memory)
        self.bias_O = bias_O
        self._out_features, self._variant = weight_OI.shape[0], variant
        self._multiply = torch.ops.tessera_cpu.paired_linear.default

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        out_TO: Tensor = self._multiply(
            x_TI, self.packed, self.bias_O, self._out_features, self._variant
        )
        return out_TO


def pack(weight_OI: Tensor, variant: int, memory: HugePages) -> Tensor:
    """The weight's blocks [ceil(O / 64), I / 2, 64, 2]; outputs beyond the last are zero."""
    rows, columns = weight_OI.shape
    blocks = memory.empty((-(-rows // OUT), columns // 2, OUT, 2), torch.bfloat16)
    torch.ops.tessera_cpu.pack_paired(weight_OI.contiguous(), blocks, variant)
    return blocks
