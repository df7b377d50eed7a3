"""The vocabulary split over ranks: token embeddings at the bottom, the head at the top.

Every rank holds ceil(vocabulary / ranks) rows; where that does not come out even, the last ranks'
missing rows are zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.base import Backend, Linear
from tessera.shard.layers.base import Layer, Parameter, Source
from tessera.shard.parallel import Group


class VocabParallelEmbedding(Layer):
    """Token ids to vectors. The table stays a plain tensor, for it is indexed, not multiplied."""

    weight_VD: Tensor

    def __init__(self, group: Group, name: str, vocab_size: int, width: int) -> None:
        self._group = group
        self._first, table = _rows_of_rank(group, name, vocab_size, width)
        self.parameters = {"weight_VD": table}

    def __call__(self, ids_T: Tensor) -> Tensor:
        """[T, D], a new tensor, equal on every rank."""
        if self._group.world_size == 1:
            return F.embedding(ids_T, self.weight_VD)
        local_T = ids_T - self._first
        mine_T = (local_T >= 0) & (local_T < self.weight_VD.shape[0])
        x_TD = F.embedding(local_T.clamp(0, self.weight_VD.shape[0] - 1), self.weight_VD)
        return self._group.all_reduce(x_TD.masked_fill_(~mine_T[:, None], 0))


class VocabParallelHead(Layer):
    """Hidden states to logits, gathered on rank 0."""

    weight_VD: Tensor
    _linear: Linear

    def __init__(
        self,
        group: Group,
        name: str,
        vocab_size: int,
        width: int,
        tied: VocabParallelEmbedding | None,
    ) -> None:
        """`tied`: the embedding whose table is this head's weight too (no tensor of its own)."""
        self._group = group
        self._vocab_size = vocab_size
        self._tied = tied
        if tied is None:
            self.parameters = {"weight_VD": _rows_of_rank(group, name, vocab_size, width)[1]}
        else:
            self.unused = (f"{name}.weight",)

    def pack(self, backend: Backend) -> None:
        """See `Layer.pack`. A backend that lays weights out anew holds a tied table twice."""
        if self._tied is None:
            self._linear = backend.linear(self.weight_VD, None)
            del self.weight_VD
        else:
            self._linear = backend.linear(self._tied.weight_VD, None)

    def __call__(self, hidden_RD: Tensor) -> Tensor | None:
        """float32 [R, vocab_size] on rank 0, None on the others. Not finite stays not finite."""
        logits_RV = self._group.gather_last_dim(self._linear(hidden_RD))
        if logits_RV is None:
            return None
        return logits_RV[:, : self._vocab_size].to(torch.float32)


def _rows_of_rank(group: Group, name: str, vocab_size: int, width: int) -> tuple[int, Parameter]:
    """The first row of this rank, and its rows as a parameter."""
    rows = -(-vocab_size // group.world_size)
    first, last = (min(rows * rank, vocab_size) for rank in (group.rank, group.rank + 1))
    source = Source(f"{name}.weight", (vocab_size, width), 0, (first, last))
    return rows * group.rank, Parameter((rows, width), (source,))
