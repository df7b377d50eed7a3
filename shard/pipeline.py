"""Runs steps in order on the device's thread, one ahead where the device allows it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch

from tessera.proto import shard_pb2
from tessera.shard.engine import Engine
from tessera.shard.errors import DivergenceError
from tessera.shard.launched import Launched

T = TypeVar("T")
R = TypeVar("R")


class Pipeline(Protocol):
    """The steps of one stream. The device thread is the only one that works with the engine."""

    def put(self, step: shard_pb2.Step | None) -> None:
        """The next step, from the event loop; None: no more will come."""
        ...

    def close(self) -> None:
        """Let go of the device's thread as soon as possible."""
        ...

    def replies(self) -> AsyncGenerator[shard_pb2.StepReply]:
        """The reply to each step, in order, until it is closed.

        Raises:
            DivergenceError: a step is missing, or the engine says so.
        """
        ...


def pipeline(engine: Engine, device_thread: ThreadPoolExecutor) -> Pipeline:
    """The one that fits the device."""
    return (OneAhead if engine.runs_ahead else InOrder)(engine, device_thread)


class _Counter:
    """Sees to it that no step is missing."""

    def __init__(self) -> None:
        self._next_step_id = 0

    def count(self, step: shard_pb2.Step) -> None:
        if step.step_id != self._next_step_id:
            raise DivergenceError(f"got step {step.step_id}, expected {self._next_step_id}")
        self._next_step_id += 1


class InOrder:
    """For devices that compute while the host waits: one step after the other.

    The device's thread takes its steps itself: a step that has come begins when the one before it
    ends, and nobody waits for the event loop to hear of it.
    """

    def __init__(self, engine: Engine, device_thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._device_thread = device_thread
        self._counter = _Counter()
        self._steps: SimpleQueue[shard_pb2.Step | None] = SimpleQueue()
        self._is_closed = False

    def put(self, step: shard_pb2.Step | None) -> None:
        """See `Pipeline`."""
        self._steps.put(step)

    def close(self) -> None:
        """See `Pipeline`."""
        self._is_closed = True
        self._steps.put(None)

    async def replies(self) -> AsyncGenerator[shard_pb2.StepReply]:
        """See `Pipeline`."""
        loop = asyncio.get_running_loop()
        replies: asyncio.Queue[shard_pb2.StepReply | None] = asyncio.Queue()

        def tell(reply: shard_pb2.StepReply | None) -> None:
            loop.call_soon_threadsafe(replies.put_nowait, reply)

        working = loop.run_in_executor(self._device_thread, self._work, tell)
        try:
            while (reply := await replies.get()) is not None:
                yield reply
            await working
        finally:
            self.close()

    def _work(self, tell: Callable[[shard_pb2.StepReply | None], None]) -> None:
        try:
            with torch.inference_mode():
                while (step := self._steps.get()) is not None and not self._is_closed:
                    self._counter.count(step)
                    tell(self._engine.run(step))
        finally:
            tell(None)


class OneAhead:
    """For devices that go on while the host does something else.

    A step that comes while the device computes the one before it is launched at once, so that the
    device goes from one to the other without waiting for the host.
    """

    def __init__(self, engine: Engine, device_thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._device_thread = device_thread
        self._counter = _Counter()
        self._steps: asyncio.Queue[shard_pb2.Step | None] = asyncio.Queue()

    def put(self, step: shard_pb2.Step | None) -> None:
        """See `Pipeline`."""
        self._steps.put_nowait(step)

    def close(self) -> None:
        """As if the stream had ended: what has come is computed first."""
        self.put(None)

    async def replies(self) -> AsyncGenerator[shard_pb2.StepReply]:
        """See `Pipeline`."""
        while (step := await self._steps.get()) is not None:
            launched: Launched | None = await self._launch(step)
            while launched is not None:
                following = None
                if launched.may_be_followed:
                    following = await self._next_while(launched)
                yield await self._on_device(self._engine.finish, launched)
                launched = following

    async def _next_while(self, launched: Launched) -> Launched | None:
        """Wait until a step is computed; the next one, launched, if it has come by then."""
        computed = asyncio.ensure_future(asyncio.to_thread(self._engine.wait, launched))
        arriving = asyncio.ensure_future(self._steps.get())
        following = None
        try:
            await asyncio.wait((computed, arriving), return_when=asyncio.FIRST_COMPLETED)
            if arriving.done() and (step := arriving.result()) is not None:
                following = await self._launch(step)
            elif arriving.done():
                self.put(None)  # again, for who asks next
            await computed
        finally:
            arriving.cancel()
        return following

    async def _launch(self, step: shard_pb2.Step) -> Launched:
        self._counter.count(step)
        return await self._on_device(self._engine.launch, step)

    async def _on_device(self, work: Callable[[T], R], subject: T) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device_thread, work, subject)
