"""Split over any number of ranks, layers compute what one rank computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera.shard.backends import load_backend
from tessera.shard.errors import CheckpointError
from tessera.shard.layers.attention import share_heads
from tessera.shard.layers.base import Layer, Parameter, Source, share
from tessera.shard.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from tessera.shard.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from tessera.shard.layers.norm import LayerNorm
from tessera.shard.parallel import Group
from tests.shard.models.driver import on_ranks

BACKEND = load_backend("cpu", "reference")
RANKS = [1, 2, 3, 4]


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def fill(layer: Layer, tensors: dict[str, Tensor]) -> None:
    """What the loader does, from a dictionary."""
    for part in layer.layers():
        for attribute, parameter in part.parameters.items():
            setattr(part, attribute, _filled(parameter, tensors))
        part.pack(BACKEND)


def _filled(parameter: Parameter, tensors: dict[str, Tensor]) -> Tensor:
    filled = torch.zeros(parameter.shape)
    for source in parameter.sources:
        whole = tensors[source.name]
        assert whole.shape == source.shape
        first, last = source.span or (0, whole.shape[source.dim])
        piece = whole.narrow(source.dim, first, last - first)
        filled[source.first_row : source.first_row + piece.shape[0]] = piece
    return filled


def run(world_size: int, work: Callable[[Group], Tensor | None]) -> list[Tensor | None]:
    return [work(Group())] if world_size == 1 else on_ranks(world_size, work)


@pytest.mark.parametrize("world_size", RANKS)
def test_column_then_row_parallel(world_size: int) -> None:
    """A pair of fused projections and the way back; 10 inner columns for up to 4 ranks."""
    tensors = {
        "a.weight": numbers(10, 6),
        "a.bias": numbers(10),
        "b.weight": numbers(10, 6) + 1,
        "b.bias": numbers(10) + 1,
        "down.weight": numbers(5, 10),
        "down.bias": numbers(5),
    }
    x = numbers(7, 6)

    def work(group: Group) -> Tensor:
        span = share(10, group)
        up = ColumnParallelLinear(6, [Projection(n, 10, span) for n in "ab"], bias=True)
        down = RowParallelLinear(group, "down", 10, span, 5, bias=True)
        fill(up, tensors)
        fill(down, tensors)
        a, b = up(x).chunk(2, dim=-1)
        return down(a * b)

    a, b = (x @ tensors[f"{n}.weight"].T + tensors[f"{n}.bias"] for n in "ab")
    expected = (a * b) @ tensors["down.weight"].T + tensors["down.bias"]
    for ours in run(world_size, work):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [8, 5, 2])
@pytest.mark.parametrize("world_size", RANKS)
def test_vocabulary_parallel(world_size: int, rows: int) -> None:
    """2 rows leave two of four ranks without any."""
    table, head = numbers(rows, 3), numbers(rows, 3) + 1
    ids = torch.tensor([0, rows - 1, 1, 1, 0])

    def work(group: Group) -> tuple[Tensor, Tensor | None]:
        embedding = VocabParallelEmbedding(group, "embed", rows, 3)
        top = VocabParallelHead(group, "head", rows, 3, tied=None)
        fill(embedding, {"embed.weight": table})
        fill(top, {"head.weight": head})
        return embedding(ids), top(numbers(4, 3))

    results = [work(Group())] if world_size == 1 else on_ranks(world_size, work)
    for embedded, _ in results:
        assert torch.equal(embedded, table[ids])
    logits = results[0][1]
    assert logits is not None
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, numbers(4, 3) @ head.T)
    assert all(other is None for _, other in results[1:])


def test_embeddings_may_be_written_to() -> None:
    """Image features are put over them; the table must not change."""
    embedding = VocabParallelEmbedding(Group(), "embed", 4, 3)
    fill(embedding, {"embed.weight": numbers(4, 3)})
    embedding(torch.tensor([1, 1]))[:] = 7
    assert torch.equal(embedding(torch.tensor([1])), numbers(4, 3)[1:2])


def test_packing_drops_the_plain_weight() -> None:
    up = ColumnParallelLinear(6, [Projection("a", 10, (0, 10))], bias=True)
    fill(up, {"a.weight": numbers(10, 6), "a.bias": numbers(10)})
    assert not hasattr(up, "weight_OI")
    assert not hasattr(up, "bias_O")


def test_layer_norm_is_torchs() -> None:
    norm = LayerNorm("n", 6, 1e-3)
    fill(norm, {"n.weight": numbers(6), "n.bias": numbers(6) + 1})
    expected = torch.nn.functional.layer_norm(numbers(2, 6), (6,), numbers(6), numbers(6) + 1, 1e-3)
    assert torch.equal(norm(numbers(2, 6)), expected)


def test_layers_are_found_once_and_in_order() -> None:
    class Leaf(Layer):
        def __init__(self, name: str) -> None:
            self.parameters = {"w": Parameter((1,), (Source(name, (1,)),))}

    class Tree(Layer):
        def __init__(self) -> None:
            self.first = Leaf("a")
            self.many = [Leaf("b"), Leaf("c")]
            self.again = self.first
            self.last = Leaf("d")

    names = [p.sources[0].name for x in Tree().layers() for p in x.parameters.values()]
    assert names == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world_size", "kv_spans"),
    [
        (8, 8, 2, [(0, 4), (4, 8)]),
        (8, 4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (8, 2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (8, 1, 2, [(0, 1), (0, 1)]),
        (6, 3, 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_every_query_head_finds_its_kv_head(
    heads: int, kv_heads: int, world_size: int, kv_spans: list[tuple[int, int]]
) -> None:
    shares = [share_heads(heads, kv_heads, Group(rank, world_size)) for rank in range(world_size)]
    assert [s.kv for s in shares] == kv_spans
    for s in shares:
        local = (s.query[1] - s.query[0]) // (s.kv[1] - s.kv[0])  # query heads per local kv head
        for i, head in enumerate(range(*s.query)):
            assert s.kv[0] + i // local == head // (heads // kv_heads)
    assert [head for s in shares for head in range(*s.query)] == list(range(heads))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world_size", "choices"),
    [
        (8, 2, 3, "1, 2, 4, 8"),
        (32, 8, 5, "1, 2, 4, 8, 16, 32"),
        (6, 4, 3, "1, 2"),
        (4, 4, 8, "1, 2, 4"),
    ],
)
def test_ranks_that_cannot_share_heads(
    heads: int, kv_heads: int, world_size: int, choices: str
) -> None:
    with pytest.raises(CheckpointError, match=f"NUM_SHARD can be {choices}$"):
        share_heads(heads, kv_heads, Group(0, world_size))
