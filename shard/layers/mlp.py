"""The gated feed-forward block of llama-like decoders, its inner width split over ranks."""

from torch import Tensor

from tessera.shard.backends.base import Backend
from tessera.shard.layers.activations import activation
from tessera.shard.layers.base import Layer, share
from tessera.shard.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from tessera.shard.parallel import Group


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(
        self,
        backend: Backend,
        group: Group,
        name: str,
        width: int,
        inner: int,
        act: str,
        bias: bool,
    ) -> None:
        span = share(inner, group)
        projections = [Projection(f"{name}.{p}", inner, span) for p in ("gate_proj", "up_proj")]
        self.gate_up_proj = ColumnParallelLinear(width, projections, bias, quantizable=True)
        self.down_proj = RowParallelLinear(
            group, f"{name}.down_proj", inner, span, width, bias, quantizable=True
        )
        self._gate = self._any_gate
        self._act = activation(act, "hidden_act")
        if act in ("silu", "swish"):
            self._gate = backend.silu_mul

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D], equal on every rank."""
        return self.down_proj(self._gate(self.gate_up_proj(x_TD)))

    def _any_gate(self, gate_up_TF: Tensor) -> Tensor:
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return self._act(gate) * up
