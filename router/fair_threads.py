"""A pool of threads in which requests take turns, so that one with many jobs delays nobody else."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class FairThreads:
    """Runs one job of each owner in turn; an owner's jobs run in the order they came in."""

    def __init__(self, workers: int, name: str) -> None:
        """`workers`: threads; `name`: what they are called."""
        self._pool = ThreadPoolExecutor(workers, name)
        self._lock = threading.Lock()
        self._queues: dict[object, deque[tuple[Callable[[], Any], Future[Any]]]] = {}

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, owner: object, job: Callable[[], T]) -> T:
        """What `job` returns or raises. When this is cancelled before its turn, it never runs."""
        future: Future[T] = Future()
        with self._lock:
            self._queues.setdefault(owner, deque()).append((job, future))
        self._pool.submit(self._run_next)
        return await asyncio.wrap_future(future)

    def _run_next(self) -> None:
        """Called once per job, but for the one whose turn it is."""
        with self._lock:
            owner, queue = next(iter(self._queues.items()))
            job, future = queue.popleft()
            del self._queues[owner]
            if queue:
                self._queues[owner] = queue  # at the end
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # the caller's to handle, as in any executor
                future.set_exception(error)
