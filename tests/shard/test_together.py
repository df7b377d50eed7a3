"""Work of several ranks that fails on one of them: all learn of it, none waits for ever."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.backends import load_backend
from tessera.shard.backends.base import LastRows, LayerCache, StepLayout
from tessera.shard.engine import Engine
from tessera.shard.errors import GroupLost, PartFailed
from tessera.shard.models.base import ImageTiles, Placement
from tessera.shard.parallel import Group
from tests.shard.models.driver import on_ranks
from tests.shard.test_engine import BAD, VOCABULARY, TableModel, chunk, make_image, tokens

NUM_EXCHANGES = 3
NEVER = 99


class SharedTable(TableModel):
    """Each rank holds an equal part of every logit; what is short can differ between ranks."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self.fails_before = NEVER  # the exchange before which memory is short, if it is

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        self.group.all_reduce(torch.ones(len(images), 2))
        return super().encode_images(images)

    def forward(
        self,
        x_TD: Tensor,
        caches: list[LayerCache],
        layout: StepLayout,
        wanted: LastRows | None = None,
    ) -> Tensor:
        wrong_T1 = torch.zeros(x_TD.shape[0], 1)
        for number in range(NUM_EXCHANGES):
            if number == self.fails_before:
                super().forward(x_TD, caches, layout)  # raises when there is no room
            total_T2 = self.group.all_reduce(torch.full((x_TD.shape[0], 2), number + 1.0))
            wrong_T1 += total_T2[:, :1] - (number + 1.0) * self.group.world_size
        return super().forward(x_TD, caches, layout) + wrong_T1 * torch.arange(VOCABULARY)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        pieces_RV = hidden_RD.chunk(self.group.world_size, dim=-1)
        mine_RV = pieces_RV[self.group.rank].contiguous()
        return self.group.gather_last_dim(mine_RV)  # type: ignore[return-value]


def engines(change: Callable[[SharedTable], None], *steps: shard_pb2.Step) -> list[object]:
    """Every rank's replies to the steps; the model is changed after the first."""

    def one(group: Group) -> list[shard_pb2.StepReply]:
        model = SharedTable(group)
        model.width = model.vocab_size
        placement = Placement(load_backend("cpu", "reference"), group, torch.float32)
        engine = Engine(model, placement, 4)
        engine.allocate_cache(20)
        replies = [engine.run(steps[0])]
        change(model)
        return replies + [engine.run(step) for step in steps[1:]]

    return on_ranks(2, one)


STEP = shard_pb2.Step(chunks=[chunk(0, [5, 6, 7, 8, 9]), chunk(1, [4, 3])])
AGAIN = shard_pb2.Step(released_sequence_ids=[0, 1], chunks=STEP.chunks)


@pytest.mark.parametrize("short_rank", [0, 1])
@pytest.mark.parametrize("fails_before", range(NUM_EXCHANGES))
@pytest.mark.parametrize("room", [1, 3])
def test_a_rank_short_of_memory_makes_all_ranks_work_in_parts(
    short_rank: int, fails_before: int, room: int
) -> None:
    def change(model: SharedTable) -> None:
        if model.group.rank == short_rank:
            model.room, model.fails_before = room, fails_before

    first, again = engines(change, STEP, AGAIN)[0]
    assert tokens(again) == tokens(first) and len(tokens(first)) == 2
    assert not again.failures


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sequence_that_fails_on_one_rank_fails_alone_on_all(rank: int) -> None:
    def change(model: SharedTable) -> None:
        if model.group.rank == rank:
            model.fails_before = 1  # the table model raises for BAD

    bad = shard_pb2.Step(
        released_sequence_ids=[0, 1], chunks=[chunk(0, [5, BAD, 6]), chunk(1, [4, 3])]
    )
    for first, again in engines(change, STEP, bad):
        assert [failure.sequence_id for failure in again.failures] == [0]
        assert "internal error" in again.failures[0].message
        assert tokens(again) == {k: v for k, v in tokens(first).items() if k == 1}


def test_pictures_are_encoded_in_parts_when_one_rank_is_short() -> None:
    def change(model: SharedTable) -> None:
        if model.group.rank == 1:
            model.room = 2

    ids = shard_pb2.ImageSpan(content_hash=b"e" * 16, offset=1, first_feature=0, length=2)
    first = shard_pb2.Step(images=[make_image(b"z" * 16, 3)], chunks=[chunk(0, [1])])
    images = [make_image(bytes([97 + n] * 16), n) for n in range(5)]
    second = shard_pb2.Step(images=images, chunks=[chunk(1, [1, 31, 31], images=[ids])])
    replies = engines(change, first, second)[0]
    assert not replies[1].failures
    assert tokens(replies[1])[1] == int(TableModel().table_VV[5].argmax())  # image 4, feature 1


def test_prompt_logprobs_are_the_same_when_they_are_scored_in_parts() -> None:
    params = shard_pb2.SamplingParams(prompt_logprobs=True, top_n_tokens=2)
    step = shard_pb2.Step(chunks=[chunk(0, [5, 6, 7, 8, 9], sampling=params)])
    again = shard_pb2.Step(released_sequence_ids=[0], chunks=step.chunks)

    def change(model: SharedTable) -> None:
        whole = model.logits

        def short(hidden_RD: Tensor) -> Tensor:
            if model.group.rank == 1 and hidden_RD.shape[0] > 2:
                raise torch.OutOfMemoryError("no room")
            return whole(hidden_RD)

        model.logits = short  # type: ignore[method-assign]

    first, second = engines(change, step, again)[0]
    assert len(first.prompt_logprobs[0].logprobs) == 4
    assert first.prompt_logprobs[0].logprobs == pytest.approx(second.prompt_logprobs[0].logprobs)
    for scored in (first.prompt_logprobs[0], second.prompt_logprobs[0]):
        assert len(scored.top_tokens) == 4
        for token_id, top in zip([6, 7, 8, 9], scored.top_tokens, strict=True):
            row_V = TableModel().table_VV[token_id - 1].log_softmax(-1)
            assert [t.token_id for t in top.tokens] == row_V.topk(2).indices.tolist()
            assert [t.logprob for t in top.tokens] == pytest.approx(row_V.topk(2).values.tolist())
    assert tokens(first) == tokens(second)


def test_work_that_never_succeeded_cannot_be_gone_through() -> None:
    def one(group: Group) -> None:
        def work() -> None:
            if group.rank == 1:
                raise torch.OutOfMemoryError("no room")
            group.all_reduce(torch.zeros(1))

        group.together("forward", 1, work)

    with pytest.raises(GroupLost, match="first forward work"):
        on_ranks(2, one)


def test_what_every_rank_learns_is_whether_memory_was_the_only_reason() -> None:
    def one(group: Group) -> list[bool]:
        seen = []
        for reasons in ((None, torch.OutOfMemoryError), (ValueError, torch.OutOfMemoryError)):
            reason = reasons[group.rank]

            def work(reason: type[Exception] | None = reason) -> None:
                group.all_reduce(torch.zeros(1))
                if reason:
                    raise reason("why")

            group.together("forward", 1, lambda: group.all_reduce(torch.zeros(1)))
            with pytest.raises(PartFailed) as failed:
                group.together("forward", 1, work)
            seen.append(failed.value.out_of_memory)
        return seen

    assert on_ranks(2, one) == [[True, False]] * 2
