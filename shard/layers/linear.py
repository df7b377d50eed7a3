"""Matrix multiplications split over ranks.

Source: Megatron-LM, arXiv 1909.08053 section 3: a column-parallel linear gives each rank some of
the outputs; a row-parallel linear takes each rank's part of the inputs and sums over ranks. A pair
of them needs one all-reduce.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tessera.shard.backends.base import Backend, Linear
from tessera.shard.layers.base import Layer, Parameter, Source, Span
from tessera.shard.parallel import Group
from tessera.shard.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Projection:
    """One checkpoint linear in a column-parallel weight, and which of its outputs this rank has."""

    name: str  # `<name>.weight` and `<name>.bias` in the checkpoint
    out_features: int  # over all ranks
    span: Span


class ColumnParallelLinear(Layer):
    """Outputs split over ranks; several projections of one input are one multiplication."""

    weight_OI: Tensor | QuantizedWeight
    bias_O: Tensor
    _linear: Linear

    def __init__(
        self,
        in_features: int,
        projections: Sequence[Projection],
        bias: bool,
        *,
        quantizable: bool = False,
    ) -> None:
        weights, biases, row = [], [], 0
        for projection in projections:
            shape, span = (projection.out_features, in_features), projection.span
            weights.append(Source(f"{projection.name}.weight", shape, 0, span, row))
            biases.append(Source(f"{projection.name}.bias", shape[:1], 0, span, row))
            row += span[1] - span[0]
        weight = Parameter((row, in_features), tuple(weights), quantizable)
        self.parameters = {"weight_OI": weight}
        if bias:
            self.parameters["bias_O"] = Parameter((row,), tuple(biases))

    def pack(self, backend: Backend) -> None:
        """See `Layer.pack`."""
        self._linear = _packed(self, backend)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, O] with this rank's outputs, the projections one after the other."""
        return self._linear(x_TI)


class RowParallelLinear(Layer):
    """Inputs split over ranks; every rank gets the sum of what the ranks computed."""

    weight_OI: Tensor | QuantizedWeight
    bias_O: Tensor
    _linear: Linear

    def __init__(
        self,
        group: Group,
        name: str,
        in_features: int,
        span: Span,
        out_features: int,
        bias: bool,
        *,
        quantizable: bool = False,
    ) -> None:
        self._group = group
        weight = Source(f"{name}.weight", (out_features, in_features), 1, span)
        shape = (out_features, span[1] - span[0])
        self.parameters = {"weight_OI": Parameter(shape, (weight,), quantizable)}
        # The sum over ranks must hold the bias once: it is rank 0's.
        if bias and group.rank == 0:
            source = Source(f"{name}.bias", (out_features,))
            self.parameters["bias_O"] = Parameter((out_features,), (source,))
        elif bias:
            self.unused = (f"{name}.bias",)

    def pack(self, backend: Backend) -> None:
        """See `Layer.pack`."""
        self._linear = _packed(self, backend)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, O], equal on every rank, from this rank's part of the inputs."""
        return self._group.all_reduce(self._linear(x_TI))


def _packed(layer: ColumnParallelLinear | RowParallelLinear, backend: Backend) -> Linear:
    has_bias = "bias_O" in layer.parameters
    weight, bias_O = layer.weight_OI, layer.bias_O if has_bias else None
    if isinstance(weight, QuantizedWeight):
        linear = backend.quantized_linear(weight, bias_O)
    else:
        linear = backend.linear(weight, bias_O)
    del layer.weight_OI
    if has_bias:
        del layer.bias_O
    return linear
