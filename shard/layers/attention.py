"""Causal attention over the paged cache, its heads split over ranks."""

from dataclasses import dataclass

from torch import Tensor

from tessera.proto.head_sharing import possible_ranks, shareable
from tessera.shard.backends.base import Backend, LastRows, LayerCache, StepLayout
from tessera.shard.errors import CheckpointError
from tessera.shard.layers.base import Layer, Span
from tessera.shard.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from tessera.shard.parallel import Group


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one attention layer over all ranks."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    bias: bool
    window: int | None  # positions a token can see, itself included; None: all before it


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one rank."""

    query: Span
    kv: Span


def share_heads(num_heads: int, num_kv_heads: int, group: Group) -> HeadShare:
    """Which heads this rank has. Query head i reads key/value head i // (N / K).

    With more ranks than key/value heads, several ranks hold the same one.

    Raises:
        CheckpointError: this number of ranks cannot share the heads.
    """
    rank, world_size = group.rank, group.world_size
    if not shareable(num_heads, num_kv_heads, world_size):
        raise CheckpointError(
            f"{num_heads} attention heads and {num_kv_heads} key/value heads cannot be shared by "
            f"{world_size} ranks; NUM_SHARD can be {possible_ranks(num_heads, num_kv_heads)}"
        )
    heads = num_heads // world_size
    kv_heads = max(num_kv_heads // world_size, 1)
    first_kv = rank * num_kv_heads // world_size
    return HeadShare((rank * heads, (rank + 1) * heads), (first_kv, first_kv + kv_heads))


class CausalSelfAttention(Layer):
    """Project to queries, keys and values, rotate, store, attend, project back."""

    def __init__(self, backend: Backend, group: Group, name: str, shape: AttentionShape) -> None:
        self._backend = backend
        self._window = shape.window
        self.heads = heads = share_heads(shape.num_heads, shape.num_kv_heads, group)
        self.qkv_proj = ColumnParallelLinear(
            shape.width,
            [
                _heads(f"{name}.q_proj", shape.num_heads, heads.query, shape.head_size),
                _heads(f"{name}.k_proj", shape.num_kv_heads, heads.kv, shape.head_size),
                _heads(f"{name}.v_proj", shape.num_kv_heads, heads.kv, shape.head_size),
            ],
            shape.bias,
            quantizable=True,
        )
        out = _heads(f"{name}.o_proj", shape.num_heads, heads.query, shape.head_size)
        self.o_proj = RowParallelLinear(
            group,
            out.name,
            out.out_features,
            out.span,
            shape.width,
            shape.bias,
            quantizable=True,
        )
        self.unused = (f"{name}.rotary_emb.inv_freq",)  # in files of transformers before 4.32

    def __call__(
        self,
        x_TD: Tensor,
        cos_sin_LH: Tensor,
        cache: LayerCache,
        layout: StepLayout,
        wanted: LastRows | None = None,
    ) -> Tensor:
        """[T, D], equal on every rank; writes this step's keys and values to `cache`.

        With `wanted`, [S, D]: of its rows alone.
        """
        q_TNH = self._backend.rotate_and_store(self.qkv_proj(x_TD), cos_sin_LH, cache, layout)
        if wanted is not None:
            q_TNH, layout = q_TNH[wanted.rows_S], wanted.layout
        out_TNH = self._backend.attend(q_TNH, cache, layout, self._window)
        return self.o_proj(out_TNH.flatten(1))


def _heads(name: str, num_heads: int, span: Span, head_size: int) -> Projection:
    """The projection of whole heads."""
    return Projection(name, num_heads * head_size, (span[0] * head_size, span[1] * head_size))
