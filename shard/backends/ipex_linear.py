"""Linear layers with 4-bit weights by IPEX, which takes them as AWQ checkpoints hold them.

Zero points are integers there, and ours are not: what rounding them changes is a sum over each
group of inputs, which a small product adds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.quantized import GROUP, QuantizedWeight, quantize

BITS = 4
WORD = 8  # codes in 32 bits
OUTPUTS = 32  # a multiple of them, else its results are wrong
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each code in its word, from the lowest bits on


class IpexLinear:
    """See `Linear`. Weights are scale * (code - whole) + rest, the same in each group."""

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None) -> None:
        """`weight`: for which `fits` holds."""
        from intel_extension_for_pytorch.llm import quantization

        outputs, inputs = weight.shape
        self._groups = inputs // GROUP
        whole_OG = weight.zeros_OG.float().round().clamp(0, 2**BITS - 1)
        rest_OG = (whole_OG - weight.zeros_OG.float()) * weight.scales_OG.float()
        self._rest_OG = rest_OG if bool(rest_OG.any()) else None
        self._bias_O = bias_O
        self._product = quantization.IPEXWeightOnlyQuantizedLinear.from_weight(
            packed(weight.codes_OI.t()),
            weight.scales_OG.t().contiguous(),
            packed(whole_OG.t()),
            inputs,
            outputs,
            group_size=GROUP,
            quant_method=quantization.QuantMethod.AWQ_GEMM,
            dtype=quantization.QuantDtype.INT4,
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See `Linear`."""
        x_TI = x_TI.contiguous()
        out_TO: Tensor = self._product(x_TI)
        if self._rest_OG is not None:
            sums_TG = x_TI.float().view(x_TI.shape[0], self._groups, GROUP).sum(-1)
            out_TO = out_TO + F.linear(sums_TG, self._rest_OG).to(out_TO.dtype)
        if self._bias_O is not None:
            out_TO = out_TO + self._bias_O
        return out_TO


def packed(codes_XO: Tensor) -> Tensor:
    """int32 [X, O / 8] of codes below 16."""
    words_XWC = codes_XO.long().reshape(codes_XO.shape[0], -1, WORD)
    shifts_C = BITS * torch.tensor(PLACES, device=codes_XO.device)
    # The sum fills 32 bits without a sign; as int32 the highest of them becomes one.
    return (words_XWC << shifts_C).sum(-1).int()


def fits(weight: QuantizedWeight) -> bool:
    """Whether it can take the weight."""
    outputs, inputs = weight.shape
    return weight.bits == BITS and outputs % OUTPUTS == 0 and inputs > GROUP


def ipex_linear_works(device: torch.device) -> bool:
    """Whether it multiplies rightly with such weights on this device."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = (torch.randn(rows, 128, generator=generator) for rows in (64, 3))
    weight = quantize(weight_OI, BITS)
    expected = F.linear(x_TI, weight.dequantize(torch.float32))
    try:
        out = IpexLinear(weight.to(device), None)(x_TI.to(device, torch.bfloat16)).cpu()
    except Exception:  # of an operation that its build lacks, or that refuses the device
        return False
    return torch.allclose(out.float(), expected, rtol=5e-2, atol=0.4)
