"""Checkpoints whose weights are already in few bits: AWQ ("gemm") and GPTQ.

Both keep a linear's weight [O, I] transposed, several codes in an int32. With 8 codes in one:

    tensor   AWQ            GPTQ           holds
    qweight  [I, O / 8]     [I / 8, O]     codes
    qzeros   [G, O / 8]     [G, O / 8]     zero points; in GPTQ's first format less 1
    scales   [G, O]         [G, O]
    g_idx                   [I]            the group of each input

A weight is scale * (code - zero), so `QuantizedWeight` keeps them to the last bit. Where the inputs
of a group lie apart (GPTQ's desc_act), it cannot: then they are floats that may be rounded again.
Sources: the files of AutoAWQ 0.2, AutoGPTQ 0.7 and GPTQModel.

Letters: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.shard.errors import CheckpointError
from tessera.shard.layers.base import Source, Span
from tessera.shard.quantized import GROUP, QuantizedWeight

AWQ, GPTQ = "awq", "gptq"
WORD = 32  # bits
# At which place of an int32, counted from its lowest bits, each of eight columns is.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
BITS_OF_ACT_ORDER = 8
UNQUANTISED = "use the unquantised checkpoint, with QUANTIZE=int4 or int8 if you like"

Read = Callable[[Source], Tensor]


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How the linears of one checkpoint are packed."""

    method: str  # AWQ or GPTQ
    bits: int  # 4 or 8
    group_size: int | None  # inputs; None: a row is one group
    zero_offset: int = 0  # what the file's zero points lack
    act_order: bool = False  # a group's inputs lie anywhere, g_idx tells

    @property
    def kept_bits(self) -> int:
        """Bits in which its weights are kept: more where they must be rounded once more."""
        return BITS_OF_ACT_ORDER if self.act_order else self.bits

    def tensors(self, weight: Source, names: Container[str]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what stands for `weight` among `names`; empty: it is not packed."""
        stem = _stem(weight)
        if f"{stem}.qweight" not in names:
            return {}
        outputs, inputs = weight.shape
        groups = self._groups(inputs)
        shapes: dict[str, tuple[int, ...]] = {
            f"{stem}.qweight": self._packed((inputs, outputs), self._packed_dim),
            f"{stem}.qzeros": self._packed((groups, outputs), 1),
            f"{stem}.scales": (groups, outputs),
        }
        if self.act_order or f"{stem}.g_idx" in names:
            shapes[f"{stem}.g_idx"] = (inputs,)
        return shapes

    def read(self, weight: Source, names: Container[str], read: Read) -> QuantizedWeight | Tensor:
        """A rank's part of a packed weight; floats where it is not made of whole groups of
        neighbouring inputs.

        Raises:
            CheckpointError: g_idx contradicts the configuration.
        """
        stem, (outputs, inputs) = _stem(weight), weight.shape
        groups = self._groups(inputs)
        group_I, in_order = self._group_of_inputs(stem, inputs, names, read)
        dim = 1 - weight.dim  # the files hold the weight transposed
        span = groups_span = weight.span or (0, weight.shape[weight.dim])
        first, last = 0, inputs
        if dim == 0:
            first, last = span
            group_I = group_I[first:last]
            groups_span = (int(group_I.min()), int(group_I.max()) + 1)
            group_I = group_I - groups_span[0]
        codes_IO = self._codes(read, f"{stem}.qweight", (inputs, outputs), dim, span)
        zeros_GO = self._codes(read, f"{stem}.qzeros", (groups, outputs), dim, groups_span)
        zeros_GO = (zeros_GO.to(torch.int32) + self.zero_offset).half()
        scales_GO = read(Source(f"{stem}.scales", (groups, outputs), dim, groups_span)).half()
        if first % GROUP or last % GROUP or not in_order:
            values_IO = (codes_IO.float() - zeros_GO[group_I]) * scales_GO[group_I]
            return values_IO.T
        group_G = group_I[::GROUP]  # of ours, the file's
        of_groups = (tensor[group_G].T.contiguous() for tensor in (scales_GO, zeros_GO))
        return QuantizedWeight(self.bits, codes_IO.T.contiguous(), *of_groups)

    def _group_of_inputs(
        self, stem: str, inputs: int, names: Container[str], read: Read
    ) -> tuple[Tensor, bool]:
        """The group of each input, int64, and whether groups are made of neighbouring inputs."""
        usual_I = torch.arange(inputs) // (self.group_size or inputs)
        if f"{stem}.g_idx" not in names:
            return usual_I, True
        group_I = read(Source(f"{stem}.g_idx", (inputs,))).long()
        if torch.equal(group_I, usual_I):
            return usual_I, True
        if not self.act_order:
            raise CheckpointError(
                f"the groups of {stem} are not made of neighbouring inputs, but config.json says "
                f"desc_act=false; {UNQUANTISED}"
            )
        groups = self._groups(inputs)
        if group_I.min() < 0 or group_I.max() >= groups:
            raise CheckpointError(f"{stem}.g_idx names groups beyond the {groups} that there are")
        return group_I, False

    @property
    def _packed_dim(self) -> int:
        """The dimension of qweight along which codes share an int32."""
        return 1 if self.method == AWQ else 0

    def _groups(self, inputs: int) -> int:
        return -(-inputs // (self.group_size or inputs))

    def _packed(self, shape: tuple[int, int], packed_dim: int) -> tuple[int, int]:
        packed = list(shape)
        packed[packed_dim] = -(-packed[packed_dim] * self.bits // WORD)
        return packed[0], packed[1]

    def _codes(self, read: Read, name: str, shape: tuple[int, int], dim: int, span: Span) -> Tensor:
        """The part of a packed tensor of `shape` codes; uint8."""
        packed_dim = self._packed_dim if name.endswith(".qweight") else 1
        in_word = WORD // self.bits if dim == packed_dim else 1
        first, last = span
        words = (first // in_word, -(-last // in_word))
        packed = read(Source(name, self._packed(shape, packed_dim), dim, words))
        places = AWQ_PLACES if self.method == AWQ else range(WORD // self.bits)
        mask = 2**self.bits - 1
        codes = [(packed >> self.bits * place & mask).to(torch.uint8) for place in places]
        unpacked = torch.stack(codes, packed_dim + 1).flatten(packed_dim, packed_dim + 1)
        return unpacked.narrow(dim, first - words[0] * in_word, last - first)


def packed_format(config: Mapping[str, Any]) -> PackedFormat | None:
    """What config.json says of its checkpoint; None: the weights are floats.

    Raises:
        CheckpointError: they are in a format that is not read.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or method not in (AWQ, GPTQ):
        raise CheckpointError(
            f"config.json has a quantization_config ({method}) of which only {AWQ} and {GPTQ} can "
            f"be read; {UNQUANTISED}"
        )
    size = given.get("group_size", given.get("q_group_size"))
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
        raise CheckpointError(f"quantization_config.group_size={size!r} must be -1 or above 0")
    if size % GROUP and size != -1:
        raise CheckpointError(
            f"quantization_config.group_size={size} is no multiple of {GROUP}; {UNQUANTISED}"
        )
    bits, of_file = given.get("bits", given.get("w_bit")), _format_of_file(method, given)
    if bits not in ((4,) if method == AWQ else (4, 8)):
        raise CheckpointError(
            f"quantization_config.bits={bits!r} cannot be read for {method}; {UNQUANTISED}"
        )
    return PackedFormat(
        method,
        bits,
        None if size == -1 else size,
        zero_offset=1 if of_file == GPTQ else 0,
        act_order=bool(given.get("desc_act")),
    )


def _format_of_file(method: str, given: Mapping[str, Any]) -> str:
    """The layout of the tensors: gemm, gptq or gptq_v2."""
    default, known = (GPTQ, (GPTQ, "gptq_v2")) if method == GPTQ else ("gemm", ("gemm",))
    name = given.get("checkpoint_format") or (given.get("version") if method == AWQ else None)
    name = "marlin" if given.get("is_marlin_format") else str(name or default).lower()
    if name not in known:
        raise CheckpointError(
            f"the checkpoint is packed for {name!r}; of {method} only {', '.join(known)} can be "
            f"read; {UNQUANTISED}"
        )
    return name


def _stem(weight: Source) -> str:
    return weight.name.removesuffix(".weight")
