"""The shard's gRPC face: steps come in on a stream and run on the one device thread."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import grpc

from tessera.proto import shard_pb2, shard_pb2_grpc
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError, DivergenceError
from tessera.shard.pipeline import Pipeline, pipeline

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Warmup = Callable[[shard_pb2.WarmupRequest], shard_pb2.WarmupReply]


class ShardService(shard_pb2_grpc.ShardServicer):
    """One rank. Steps run one at a time, on the one thread that owns the device."""

    def __init__(
        self,
        engine: Engine,
        info: shard_pb2.InfoReply,
        warm_up: Warmup,
        device_thread: ThreadPoolExecutor,
    ) -> None:
        self._engine = engine
        self._info = info
        self._warm_up = warm_up
        self._device_thread = device_thread
        self._open: set[Pipeline] = set()

    def close(self) -> None:
        """Let go of the device's thread: a stream that is open is answered no more."""
        for steps in self._open:
            steps.close()

    async def Info(  # noqa: N802  (the name is the RPC's)
        self, request: shard_pb2.InfoRequest, context: Context
    ) -> shard_pb2.InfoReply:
        """What was loaded, and the memory it takes now."""
        self._info.used_memory_bytes = self._engine.used_memory_bytes
        return self._info

    async def Warmup(  # noqa: N802
        self, request: shard_pb2.WarmupRequest, context: Context
    ) -> shard_pb2.WarmupReply:
        """Size the KV cache; RESOURCE_EXHAUSTED with the settings to lower when it does not fit."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._device_thread, self._warm_up, request)
        except DeviceError as error:
            return await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def Steps(  # noqa: N802
        self,
        request_iterator: AsyncIterator[shard_pb2.StepMessage],
        context: Context,
    ) -> AsyncIterator[shard_pb2.StepReply]:
        """Run steps in order until the router closes the stream."""
        loop = asyncio.get_running_loop()
        steps = pipeline(self._engine, self._device_thread)
        self._open.add(steps)
        reading = asyncio.create_task(self._read(request_iterator, steps))
        try:
            async with aclosing(steps.replies()) as replies:
                async for reply in replies:
                    yield reply
        except DivergenceError as error:
            logger.error("router and shard have diverged: %s", error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception:
            logger.exception("a step failed")
            await context.abort(grpc.StatusCode.INTERNAL, "a step failed; see the shard's log")
        finally:
            reading.cancel()
            self._open.discard(steps)
            self._engine.masks.close()
            await loop.run_in_executor(self._device_thread, self._engine.reset)

    async def _read(
        self,
        messages: AsyncIterator[shard_pb2.StepMessage],
        steps: Pipeline,
    ) -> None:
        """Sort what comes while steps run: masks belong to one that may be waiting for them."""
        try:
            async for message in messages:
                if message.HasField("masks"):
                    masks = {mask.sequence_id: mask.bitmask for mask in message.masks.masks}
                    self._engine.masks.put(message.masks.step_id, masks)
                else:
                    steps.put(message.step)
        finally:
            self._engine.masks.close()
            steps.put(None)
