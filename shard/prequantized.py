"""Checkpoints whose weights are already in few bits: AWQ ("gemm") and GPTQ.

Both keep a linear's weight [O, I] transposed, several codes in an int32:

    tensor   AWQ               GPTQ              holds
    qweight  [I, O / 8]        [I / codes, O]    codes
    qzeros   [groups, O / 8]   [groups, O / 8]   zero points, packed as codes; GPTQ's less 1
    scales   [groups, O]       [groups, O]
    g_idx    -                 [I]               the group of each input

A weight is scale * (code - zero), so they are kept as `QuantizedWeight` to the last bit. Sources: the
files of AutoAWQ 0.2 and of AutoGPTQ 0.7 and GPTQModel ("gptq" and "gptq_v2").

Letters: O outputs, I inputs, G groups; W packed words, C columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.shard.errors import CheckpointError
from tessera.shard.layers.base import Source, Span
from tessera.shard.models.config_file import read_json
from tessera.shard.quantized import GROUP, QuantizedWeight

AWQ, GPTQ = "awq", "gptq"
WORD = 32  # bits
# The column whose code is in the lowest bits of an int32, then the next higher bits', and so on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
OWN_FILES = ("quantize_config.json", "quant_config.json")  # of old GPTQ and AWQ checkpoints

Read = Callable[[Source], Tensor]


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How the linears of one checkpoint are packed."""

    method: str  # AWQ or GPTQ
    bits: int
    group_size: int | None  # inputs; None: all of a row
    zero_offset: int = 0  # what the file's zero points lack
    act_order: bool = False  # inputs may belong to groups in any order

    def tensors(self, weight: Source, names: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what stands for `weight` among `names`; empty: it is not packed."""
        stem = _stem(weight)
        if f"{stem}.qweight" not in names:
            return {}
        outputs, inputs = weight.shape
        groups = -(-inputs // self._group(inputs))
        shapes = {
            f"{stem}.qweight": self._packed((inputs, outputs), self._packed_dim),
            f"{stem}.qzeros": self._packed((groups, outputs), 1),
            f"{stem}.scales": (groups, outputs),
        }
        if self.act_order or f"{stem}.g_idx" in names:
            shapes[f"{stem}.g_idx"] = (inputs,)
        return shapes

    def read(self, weight: Source, names: Mapping[str, Any], read: Read) -> QuantizedWeight | Tensor:
        """A rank's part of a packed weight; as floats where it does not begin and end with groups.

        Raises:
            CheckpointError: its inputs belong to groups in another than their own order.
        """
        outputs, inputs = weight.shape
        stem, group = _stem(weight), self._group(inputs)
        if f"{stem}.g_idx" in names:
            _check_order(stem, group, read(Source(f"{stem}.g_idx", (inputs,))))
        span = weight.span or (0, weight.shape[weight.dim])
        part = _Part(read, 1 - weight.dim, span)  # files hold the weight transposed
        of_groups = part
        first, last = span if weight.dim == 1 else (0, inputs)
        if weight.dim == 1:
            of_groups = replace(part, span=(first // group, -(-last // group)))
        groups = of_groups.whole((-(-inputs // group), outputs))
        codes_IO = self._codes(part, f"{stem}.qweight", (inputs, outputs), self._packed_dim)
        zeros_GO = self._codes(of_groups, f"{stem}.qzeros", groups, 1) + self.zero_offset
        scales_GO = of_groups.read(Source(f"{stem}.scales", groups, of_groups.dim, of_groups.span))
        group_of_I = torch.arange(first, last) // group - first // group
        if first % GROUP or (last - first) % GROUP:
            values_IO = (codes_IO.float() - zeros_GO[group_of_I]) * scales_GO[group_of_I].float()
            return values_IO.T
        rows = group_of_I[::GROUP]
        return QuantizedWeight(
            self.bits,
            codes_IO.T.contiguous(),
            scales_GO[rows].T.half().contiguous(),
            zeros_GO[rows].T.half().contiguous(),
        )
