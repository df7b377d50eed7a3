"""Runs steps in order on the device's thread, one ahead where the device allows it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tessera.proto import shard_pb2
from tessera.shard.engine import Engine
from tessera.shard.errors import DivergenceError
from tessera.shard.launched import Launched

T = TypeVar("T")
R = TypeVar("R")

StepQueue = asyncio.Queue[shard_pb2.Step | None]
"""Steps as they come; None: no more will."""


class Pipeline:
    """The steps of one stream. The device thread is the only one that works with the engine."""

    def __init__(self, engine: Engine, device_thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._device_thread = device_thread
        self._next_step_id = 0

    async def replies(self, steps: StepQueue) -> AsyncIterator[shard_pb2.StepReply]:
        """The reply to each step, in order.

        A step that comes while the device computes the one before it is launched at once, so that
        the device goes from one to the other without waiting for the host.

        Raises:
            DivergenceError: a step is missing, or the engine says so.
        """
        while (step := await steps.get()) is not None:
            if not self._engine.runs_ahead:
                self._count(step)
                yield await self._on_device(self._engine.run, step)
                continue
            launched: Launched | None = await self._launch(step)
            while launched is not None:
                following = None
                if launched.may_be_followed:
                    following = await self._next_while(launched, steps)
                yield await self._on_device(self._engine.finish, launched)
                launched = following

    async def _next_while(self, launched: Launched, steps: StepQueue) -> Launched | None:
        """Wait until a step is computed; the next one, launched, if it has come by then."""
        computed = asyncio.ensure_future(asyncio.to_thread(self._engine.wait, launched))
        arriving = asyncio.ensure_future(steps.get())
        following = None
        try:
            await asyncio.wait((computed, arriving), return_when=asyncio.FIRST_COMPLETED)
            if arriving.done() and (step := arriving.result()) is not None:
                following = await self._launch(step)
            elif arriving.done():
                steps.put_nowait(None)
            await computed
        finally:
            arriving.cancel()
        return following

    async def _launch(self, step: shard_pb2.Step) -> Launched:
        self._count(step)
        return await self._on_device(self._engine.launch, step)

    def _count(self, step: shard_pb2.Step) -> None:
        if step.step_id != self._next_step_id:
            raise DivergenceError(f"got step {step.step_id}, expected {self._next_step_id}")
        self._next_step_id += 1

    async def _on_device(self, work: Callable[[T], R], subject: T) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device_thread, work, subject)
