"""Turns between requests in a pool of threads."""

import asyncio
import threading
from functools import partial

import pytest

from tessera.router.fair_threads import FairThreads


def test_owners_take_turns_and_each_ones_jobs_keep_their_order() -> None:
    threads = FairThreads(1, "test")
    begin = threading.Event()
    ran: list[str] = []

    async def go() -> None:
        waiting = asyncio.ensure_future(threads.run("first", begin.wait))
        await asyncio.sleep(0)
        jobs = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]
        queued = [
            asyncio.ensure_future(threads.run(owner, partial(ran.append, name)))
            for owner, name in jobs
        ]
        await asyncio.sleep(0)
        begin.set()
        await asyncio.gather(waiting, *queued)

    asyncio.run(go())
    threads.close()
    assert ran == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_what_is_cancelled_before_its_turn_never_runs() -> None:
    threads = FairThreads(1, "test")
    begin = threading.Event()
    ran: list[str] = []

    async def go() -> None:
        waiting = asyncio.ensure_future(threads.run("a", begin.wait))
        left = asyncio.ensure_future(threads.run("a", partial(ran.append, "left")))
        stays = asyncio.ensure_future(threads.run("b", partial(ran.append, "stays")))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        begin.set()
        await asyncio.gather(waiting, stays)
        with pytest.raises(asyncio.CancelledError):
            await left

    asyncio.run(go())
    threads.close()
    assert ran == ["stays"]


def test_results_and_errors_reach_their_callers() -> None:
    threads = FairThreads(2, "test")

    async def go() -> None:
        assert await threads.run("a", lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", lambda: 1 // 0)
        assert await asyncio.gather(*(threads.run(n % 3, partial(pow, n, 2)) for n in range(50)))

    asyncio.run(go())
    threads.close()
