"""Linear layers with weights in the order that oneDNN reads them.

torch has the operations, for its own compiler (names with an underscore): so they are tried
against plain torch before they are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the input that the order is chosen for; the same order serves all other numbers well.
_TYPICAL_ROWS = 32


class PackedLinear:
    """`F.linear` with a repacked copy of the weight."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _TYPICAL_ROWS)
        self.bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_TI, self.packed, self.bias_O, "none", [], ""
        )
        return out_TO


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch on this processor packs weights and multiplies with them rightly."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (48, 3))
    bias_O = torch.randn(48, generator=generator).to(dtype)
    expected = F.linear(x_TI.float(), weight_OI.float(), bias_O.float())
    try:
        out = PackedLinear(weight_OI, bias_O)(x_TI)
    except (RuntimeError, AttributeError):  # the operation refused, or is gone from torch
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    return torch.allclose(out.float(), expected, rtol=tolerance, atol=tolerance * 8)
