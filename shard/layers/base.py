"""What every layer shares: where its parameters come from, and how the loader finds it.

Layers are plain classes, not `torch.nn.Module`: nothing here is trained or saved, and a module's
attribute lookups and call hooks cost more per step than the small layers themselves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tessera.shard.backends.base import Backend
from tessera.shard.parallel import Group

Span = tuple[int, int]
"""First index and one past the last."""


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor and the part of it that goes into a parameter of this rank."""

    name: str  # in the checkpoint, as `weights.canonical_name` spells it
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    dim: int = 0  # the dimension that is split over ranks
    span: Span | None = None  # this rank's part of that dimension; None: all of it
    first_row: int = 0  # row of the parameter where it starts (fused projections)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that a layer holds on this rank. Rows that no source fills are zero."""

    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    quantizable: bool = False  # the loader may put a `QuantizedWeight` there


class Layer:
    """A part of a model; its attributes may be layers, or lists of them.

    Attributes:
        parameters: attribute name -> what the loader puts there before it calls `pack`.
        unused: beginnings of the names of checkpoint tensors that this layer knows and ignores.
    """

    parameters: Mapping[str, Parameter] = {}
    unused: tuple[str, ...] = ()

    def pack(self, backend: Backend) -> None:
        """Called once, when the parameters of this layer are loaded.

        A layer that gives a parameter to `backend.linear` drops its own reference here, so that
        no more than one layer's weights exist twice at any time.
        """

    def layers(self) -> Iterator["Layer"]:
        """This layer and all below it, each once, in the order they were made."""
        seen: set[int] = set()
        stack: list[object] = [self]
        while stack:
            item = stack.pop()
            if isinstance(item, list):
                stack.extend(reversed(item))
            elif isinstance(item, Layer) and id(item) not in seen:
                seen.add(id(item))
                yield item
                stack.extend(reversed(list(vars(item).values())))


def share(total: int, group: Group) -> Span:
    """This rank's part of `total` things: as even as can be, in order of rank."""
    return total * group.rank // group.world_size, total * (group.rank + 1) // group.world_size
