"""Steps on the wire: what is sent, and what happens when a rank does not answer as it should."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from tessera.proto import shard_pb2, shard_pb2_grpc
from tessera.router.request import (
    PlacedImage,
    PreparedImage,
    Request,
    SamplingParams,
    StoppingParams,
)
from tessera.router.scheduler import ChunkPlan, DecodePlan, StepPlan
from tessera.router.sequence import Sequence
from tessera.router.shards import RankState, ShardGroup, ShardsLost, WarmupFailed, step_message
from tests.step_columns import add_token, decode_rows

T = TypeVar("T")
IMAGE = PreparedImage(bytes(16), 10, 20, 1, b"\1" * 48, num_tokens=6)


def make_sequence(**sampling: float) -> Sequence:
    request = Request(
        tuple(range(100, 120)),
        (PlacedImage(IMAGE, offset=5),),
        SamplingParams(**sampling),  # type: ignore[arg-type]
        StoppingParams(4),
    )
    return Sequence(3, request)


def chunk(first: int, last: int, *, is_start: bool = False) -> shard_pb2.Chunk:
    plan = StepPlan(chunks=[ChunkPlan(make_sequence(), first, last, (1, 2), is_start, last == 20)])
    return step_message(plan, 0).chunks[0]


@pytest.mark.parametrize(
    ("first", "last", "span"),
    [
        (0, 20, (5, 0, 6)),
        (0, 5, None),
        (0, 6, (5, 0, 1)),
        (7, 9, (0, 2, 2)),
        (8, 20, (0, 3, 3)),
        (11, 20, None),
    ],
)
def test_a_chunk_names_the_part_of_a_picture_it_covers(
    first: int, last: int, span: tuple[int, int, int] | None
) -> None:
    message = chunk(first, last)
    got = [(s.offset, s.first_feature, s.length) for s in message.images]
    assert got == ([span] if span else [])
    assert list(message.token_ids) == list(range(100 + first, 100 + last))


def test_sampling_is_sent_with_the_first_chunk_only_and_neutral_values_not_at_all() -> None:
    first, later = chunk(0, 8, is_start=True), chunk(8, 20)
    assert first.HasField("sampling") and first.num_prompt_tokens == 20
    assert not later.HasField("sampling")
    assert not first.sampling.HasField("top_p")
    sequence = make_sequence(temperature=0.5, top_p=0.9, repetition_penalty=1.2)
    plan = StepPlan(chunks=[ChunkPlan(sequence, 0, 4, (), True, False)])
    sampling = step_message(plan, 0).chunks[0].sampling
    assert sampling.top_p == pytest.approx(0.9)
    assert sampling.repetition_penalty == pytest.approx(1.2)


def test_cached_ids_are_sent_only_where_a_penalty_counts_them() -> None:
    for sampling, expected in (({}, []), ({"frequency_penalty": 0.5}, list(range(100, 108)))):
        plan = StepPlan(chunks=[ChunkPlan(make_sequence(**sampling), 8, 20, (1,), True, True)])
        assert list(step_message(plan, 0).chunks[0].cached_token_ids) == expected


def test_pictures_and_releases_are_sent() -> None:
    plan = StepPlan(images=[IMAGE], released_sequence_ids=[4], released_images=[b"x" * 16])
    message = step_message(plan, 9)
    assert message.step_id == 9
    assert (message.images[0].height, message.images[0].width) == (10, 20)
    assert message.images[0].tiles == IMAGE.tiles
    assert list(message.released_sequence_ids) == [4]
    assert list(message.released_images) == [b"x" * 16]


class FakeRank(shard_pb2_grpc.ShardServicer):
    """Answers decode rows with their token plus its own rank."""

    def __init__(self, rank: int, fault: str = "") -> None:
        self.rank = rank
        self.fault = fault
        self.num_asked = 0
        self.hiccup = 3 if fault == "stutters" else 0

    async def Info(self, request: object, context: object) -> shard_pb2.InfoReply:  # noqa: N802
        self.num_asked += 1
        if self.num_asked > 1 and (self.fault == "hangs" or self.num_asked == self.hiccup):
            await asyncio.sleep(60)
        return shard_pb2.InfoReply(
            rank=self.rank,
            world_size=2,
            block_size=16,
            model_type="llama",
            used_memory_bytes=1000 + self.num_asked,
            incarnation=int(self.fault == "is new" and self.num_asked > 1),
        )

    async def Warmup(  # noqa: N802
        self, request: object, context: grpc.aio.ServicerContext
    ) -> shard_pb2.WarmupReply:
        if self.fault == "memory":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "lower MAX_TOTAL_TOKENS")
        return shard_pb2.WarmupReply(num_blocks=100 - self.rank)

    async def Steps(  # noqa: N802
        self,
        request_iterator: AsyncIterator[shard_pb2.StepMessage],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[shard_pb2.StepReply]:
        messages = aiter(request_iterator)
        if self.fault == "leaves":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the process ended")
        async for message in messages:
            step = message.step
            if self.fault == "dies":
                await context.abort(grpc.StatusCode.INTERNAL, "a step failed")
            if self.fault == "ends":
                return
            reply = shard_pb2.StepReply(step_id=step.step_id + (self.fault == "skips"))
            for row in decode_rows(step):
                add_token(reply, sequence_id=row.sequence_id, token_id=row.token_id + self.rank)
            if self.fault == "guided":
                for mask in (await anext(messages)).masks.masks:
                    add_token(reply, sequence_id=mask.sequence_id, token_id=mask.bitmask[0])
            yield reply


def with_ranks(
    folder: Path, faults: tuple[str, str], use: Callable[[ShardGroup], Awaitable[T]]
) -> T:
    async def go() -> T:
        servers, targets = [], []
        for rank, fault in enumerate(faults):
            server = grpc.aio.server()
            shard_pb2_grpc.add_ShardServicer_to_server(FakeRank(rank, fault), server)
            targets.append(f"unix:{folder}/shard-{rank}")
            server.add_insecure_port(targets[-1])
            servers.append(server)
        group = ShardGroup(targets)
        try:
            # The first one comes up late: connecting waits for it.
            await servers[1].start()
            asyncio.get_running_loop().call_later(
                0.3, lambda: asyncio.ensure_future(servers[0].start())
            )
            info = await asyncio.wait_for(group.connect(0.05), 20)
            assert (info.model_type, info.world_size) == ("llama", 2)
            return await use(group)
        finally:
            await group.close()
            for server in servers:
                await server.stop(grace=0)

    return asyncio.run(go())


async def warm_up(group: ShardGroup) -> int:
    return await group.warm_up(shard_pb2.WarmupRequest())


async def two_steps(group: ShardGroup) -> list[int]:
    await warm_up(group)
    tokens = []
    for token in (7, 8):
        row = DecodePlan(make_sequence(), token, 21, ())
        reply = await group.receive(await group.send(StepPlan(decodes=[row])))
        tokens += list(reply.tokens.token_ids)
    return tokens


def test_the_answer_is_rank_0s(tmp_path: Path) -> None:
    assert with_ranks(tmp_path, ("", ""), two_steps) == [7, 8]


def test_masks_go_to_rank_0_alone_while_it_computes_their_step(tmp_path: Path) -> None:
    async def guided_steps(group: ShardGroup) -> list[dict[int, int]]:
        await warm_up(group)
        tokens = []
        for number in range(2):
            step_id = await group.send(StepPlan(released_sequence_ids=[1]))
            await group.send_masks(step_id, {7: bytes([40 + number]), 8: b"x"})
            reply = await group.receive(step_id)
            tokens.append(dict(zip(reply.tokens.sequence_ids, reply.tokens.token_ids, strict=True)))
        return tokens

    got = with_ranks(tmp_path, ("guided", ""), guided_steps)
    assert got == [{7: 40, 8: ord("x")}, {7: 41, 8: ord("x")}]


def test_the_pool_is_the_smallest_of_all_ranks(tmp_path: Path) -> None:
    assert with_ranks(tmp_path, ("", ""), warm_up) == 99


def test_a_warm_up_that_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(WarmupFailed, match="lower MAX_TOTAL_TOKENS"):
        with_ranks(tmp_path, ("", "memory"), warm_up)


@pytest.mark.parametrize("fault", ["dies", "ends", "skips"])
def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, fault: str) -> None:
    with pytest.raises(ShardsLost, match="shard 1"):
        with_ranks(tmp_path, ("", fault), two_steps)


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardsLost, match="shard 1 has not answered"):
        with_ranks(tmp_path, ("", "hangs"), lambda group: group.watch(0.01, 0.1))


def test_a_rank_that_ends_while_nobody_asks_for_anything_is_noticed(tmp_path: Path) -> None:
    async def idle(group: ShardGroup) -> None:
        await warm_up(group)
        await asyncio.wait_for(group.watch(interval_s=60, timeout_s=60), 20)

    with pytest.raises(ShardsLost, match="shard 1 is gone: the process ended"):
        with_ranks(tmp_path, ("", "leaves"), idle)


def test_nothing_of_a_watch_is_left_behind(tmp_path: Path) -> None:
    async def lose(group: ShardGroup) -> None:
        await warm_up(group)
        with pytest.raises(ShardsLost):
            await asyncio.wait_for(group.watch(interval_s=60, timeout_s=60), 20)
        left = [str(task.get_coro()) for task in asyncio.all_tasks()]
        assert [one for one in left if "_watch" in one or "_stream_end" in one] == []

    with_ranks(tmp_path, ("", "leaves"), lose)


def test_a_rank_that_was_started_anew_is_another_one(tmp_path: Path) -> None:
    with pytest.raises(ShardsLost, match="shard 1 was started anew"):
        with_ranks(tmp_path, ("", "is new"), lambda group: group.watch(0.01, 5))


def test_what_is_known_of_each_rank(tmp_path: Path) -> None:
    async def ask(group: ShardGroup) -> None:
        memory = [state.info.used_memory_bytes for state in group.ranks if state.info]
        assert [state.answers for state in group.ranks] == [True, True]
        with pytest.raises(ShardsLost):
            await group.watch(0.01, 0.1)
        assert [state.answers for state in group.ranks] == [True, False]
        later = [state.info.used_memory_bytes for state in group.ranks if state.info]
        assert later[0] > memory[0] == memory[1] == later[1]

    assert ShardGroup(["unix:nowhere"]).ranks == [RankState()]
    with_ranks(tmp_path, ("", "hangs"), ask)


@pytest.mark.parametrize("fault", ["dies", "ends", "skips"])
def test_a_rank_that_is_lost_does_not_count_as_answering(tmp_path: Path, fault: str) -> None:
    async def lose(group: ShardGroup) -> list[bool]:
        with pytest.raises(ShardsLost):
            await two_steps(group)
        return [state.answers for state in group.ranks]

    assert with_ranks(tmp_path, ("", fault), lose) == [True, False]


def test_one_missed_answer_is_forgiven(tmp_path: Path) -> None:
    async def watch_a_while(group: ShardGroup) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(group.watch(0.01, 0.5), 2)

    with_ranks(tmp_path, ("", "stutters"), watch_a_while)
