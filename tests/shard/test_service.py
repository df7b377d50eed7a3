"""The gRPC face of a shard, with an engine that computes nothing."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TypeVar

import grpc
import pytest
import torch

from tessera.proto import shard_pb2, shard_pb2_grpc
from tessera.shard.errors import DeviceError, DivergenceError
from tessera.shard.service import ShardService
from tessera.shard.token_masks import TokenMaskBox
from tests.step_columns import DecodeRow, add_token, columns, decode_rows

T = TypeVar("T")


class EchoEngine:
    """Answers each decode row with its token plus one, so that a lost or swapped row shows."""

    runs_ahead = False

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.resets = 0
        self.masks = TokenMaskBox()
        self.used_memory_bytes = 4096

    def run(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
        assert torch.is_inference_mode_enabled()
        return self.echo(step)

    def echo(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
        if self.failure is not None:
            raise self.failure
        reply = shard_pb2.StepReply(step_id=step.step_id)
        for row in decode_rows(step):
            add_token(reply, sequence_id=row.sequence_id, token_id=row.token_id + 1)
        return reply

    def reset(self) -> None:
        self.resets += 1


def no_memory(request: shard_pb2.WarmupRequest) -> shard_pb2.WarmupReply:
    raise DeviceError(f"lower MAX_TOTAL_TOKENS={request.max_context_len}")


def with_service(engine: EchoEngine, use: Callable[[shard_pb2_grpc.ShardStub], Awaitable[T]]) -> T:
    async def go() -> T:
        with ThreadPoolExecutor(1) as thread:
            server = grpc.aio.server()
            info = shard_pb2.InfoReply(rank=1, world_size=2)
            service = ShardService(engine, info, no_memory, thread)  # type: ignore[arg-type]
            shard_pb2_grpc.add_ShardServicer_to_server(service, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    return await use(shard_pb2_grpc.ShardStub(channel))
            finally:
                await server.stop(grace=1)

    return asyncio.run(go())


def step(step_id: int, *token_ids: int) -> shard_pb2.Step:
    rows = [DecodeRow(sequence_id=9 - n, token_id=t) for n, t in enumerate(token_ids)]
    return shard_pb2.Step(step_id=step_id, decodes=columns(*rows))


async def replies(
    stub: shard_pb2_grpc.ShardStub, *steps: shard_pb2.Step
) -> list[shard_pb2.StepReply]:
    async def requests() -> AsyncIterator[shard_pb2.Step]:
        for message in steps:
            yield shard_pb2.StepMessage(step=message)

    return [reply async for reply in stub.Steps(requests())]


def test_steps_are_answered_in_order() -> None:
    engine = EchoEngine()
    got = with_service(engine, lambda stub: replies(stub, step(0, 40, 10), step(1), step(2, 7)))
    assert [reply.step_id for reply in got] == [0, 1, 2]
    assert list(got[0].tokens.token_ids) == [41, 11]


def test_masks_reach_a_step_that_waits_for_them() -> None:
    class Waiting(EchoEngine):
        def run(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
            (mask,) = self.masks.take(step.step_id, [9]).values()
            reply = shard_pb2.StepReply(step_id=step.step_id)
            add_token(reply, sequence_id=9, token_id=mask[0])
            return reply

    async def use(stub: shard_pb2_grpc.ShardStub) -> list[int]:
        stream = stub.Steps()
        for number in range(2):  # the second while the first waits
            await stream.write(shard_pb2.StepMessage(step=step(number)))
        got = []
        for number in range(2):
            mask = shard_pb2.TokenMask(sequence_id=9, bitmask=bytes([40 + number]))
            masks = shard_pb2.TokenMasks(step_id=number, masks=[mask])
            await stream.write(shard_pb2.StepMessage(masks=masks))
            got.append((await stream.read()).tokens.token_ids[0])
        await stream.done_writing()
        return got

    assert with_service(Waiting(), use) == [40, 41]


class AheadEngine(EchoEngine):
    """A device that is done with a step only once it has been given the next one."""

    runs_ahead = True

    def __init__(self, last_step_id: int) -> None:
        super().__init__()
        self.last_step_id = last_step_id
        self.log: list[str] = []
        self.launched = [threading.Event() for _ in range(last_step_id + 2)]

    def launch(self, step: shard_pb2.Step) -> SimpleNamespace:
        self.log.append(f"launch {step.step_id}")
        self.launched[step.step_id].set()
        return SimpleNamespace(step=step, may_be_followed=not step.released_images)

    def wait(self, launched: SimpleNamespace) -> None:
        following = launched.step.step_id + 1
        if following <= self.last_step_id:
            assert self.launched[following].wait(20)

    def finish(self, launched: SimpleNamespace) -> shard_pb2.StepReply:
        self.log.append(f"finish {launched.step.step_id}")
        return self.echo(launched.step)


def test_the_next_step_is_launched_while_the_device_computes_this_one() -> None:
    engine = AheadEngine(last_step_id=3)
    steps = [step(number, 10 * number) for number in range(4)]
    got = with_service(engine, lambda stub: replies(stub, *steps))
    assert [reply.tokens.token_ids[0] for reply in got] == [1, 11, 21, 31]
    order = "launch 0,launch 1,finish 0,launch 2,finish 1,launch 3,finish 2,finish 3"
    assert engine.log == order.split(",")


def test_a_step_that_cannot_be_followed_is_finished_first() -> None:
    engine = AheadEngine(last_step_id=1)
    guided = step(0, 1)
    guided.released_images.append(b"a mark of this test")
    got = with_service(engine, lambda stub: replies(stub, guided, step(1, 2)))
    assert [reply.step_id for reply in got] == [0, 1]
    assert engine.log == ["launch 0", "finish 0", "launch 1", "finish 1"]


def test_a_step_that_comes_late_is_answered_too() -> None:
    engine = AheadEngine(last_step_id=0)

    async def use(stub: shard_pb2_grpc.ShardStub) -> list[int]:
        stream, got = stub.Steps(), []
        for number in range(2):
            engine.last_step_id = number
            await stream.write(shard_pb2.StepMessage(step=step(number, number)))
            got.append((await stream.read()).tokens.token_ids[0])
        await stream.done_writing()
        return got

    assert with_service(engine, use) == [1, 2]


def test_a_skipped_step_is_refused_by_a_device_that_runs_ahead() -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        with_service(AheadEngine(last_step_id=0), lambda stub: replies(stub, step(0), step(2)))
    assert "expected 1" in (error.value.details() or "")


def test_a_router_that_leaves_does_not_leave_a_step_waiting() -> None:
    class Waiting(EchoEngine):
        def run(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
            self.missed = self.masks.take(step.step_id, [9]) == {}
            return shard_pb2.StepReply(step_id=step.step_id)

    engine = Waiting()
    with_service(engine, lambda stub: replies(stub, step(0)))
    assert engine.missed and engine.resets == 1


def test_a_router_that_leaves_takes_its_steps_with_it() -> None:
    class Slow(EchoEngine):
        def __init__(self) -> None:
            super().__init__()
            self.started, self.may_end, self.ran = threading.Event(), threading.Event(), 0

        def run(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
            self.started.set()
            self.ran += 1
            assert self.may_end.wait(20)
            return super().run(step)

    engine = Slow()

    async def use(stub: shard_pb2_grpc.ShardStub) -> None:
        stream = stub.Steps()
        for number in range(3):
            await stream.write(shard_pb2.StepMessage(step=step(number)))
        assert await asyncio.to_thread(engine.started.wait, 20)
        stream.cancel()
        while not engine.masks._is_closed:
            await asyncio.sleep(0.01)
        engine.may_end.set()

    with_service(engine, use)
    assert engine.ran == 1 and engine.resets == 1


def test_a_shard_that_ends_does_not_wait_for_its_router() -> None:
    async def go() -> None:
        with ThreadPoolExecutor(1) as thread:
            service = ShardService(EchoEngine(), shard_pb2.InfoReply(), no_memory, thread)  # type: ignore[arg-type]

            async def silent() -> AsyncIterator[shard_pb2.StepMessage]:
                await asyncio.sleep(60)
                yield shard_pb2.StepMessage()

            stream = service.Steps(silent(), None)  # type: ignore[arg-type]
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            service.close()
            with pytest.raises(StopAsyncIteration):
                await first

    asyncio.run(asyncio.wait_for(go(), 20))


def test_closing_the_stream_releases_every_sequence() -> None:
    engine = EchoEngine()
    with_service(engine, lambda stub: replies(stub, step(0, 1)))
    assert engine.resets == 1


def test_skipped_step_is_refused() -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        with_service(EchoEngine(), lambda stub: replies(stub, step(0), step(2)))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "expected 1" in (error.value.details() or "")


def test_divergence_found_by_the_engine_is_told() -> None:
    engine = EchoEngine(DivergenceError("sequence 3: have no such sequence"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        with_service(engine, lambda stub: replies(stub, step(0)))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_bug_in_a_step_ends_the_stream_without_its_details() -> None:
    engine = EchoEngine(RuntimeError("secret /path"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        with_service(engine, lambda stub: replies(stub, step(0)))
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.value.details() or "")


def test_info_and_a_warm_up_that_does_not_fit() -> None:
    async def use(stub: shard_pb2_grpc.ShardStub) -> tuple[int, str]:
        info = await stub.Info(shard_pb2.InfoRequest())
        assert info.used_memory_bytes == 4096
        try:
            await stub.Warmup(shard_pb2.WarmupRequest(max_context_len=9))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return info.world_size, error.details() or ""
        raise AssertionError("the warm-up did not fail")

    assert with_service(EchoEngine(), use) == (2, "lower MAX_TOTAL_TOKENS=9")
