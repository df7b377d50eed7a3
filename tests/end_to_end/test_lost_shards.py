"""Shards that are killed or hang are started anew; streams pause, and answers stay the same."""

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.end_to_end.asking import Body, ask, question, words
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

PATTERN = "[0-9]{90}"  # a token has three digits at most
LENGTH = 150


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    flags = ["--num-shard", "2", "--dtype", "float32", "--max-shard-restarts", "9"]
    with running(checkpoint("next-mistral"), *flags) as stack:
        yield stack


def shards_of(stack: Stack) -> list[psutil.Process]:
    """The living ones, in the order of their ranks."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(stack.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended, and zombies
            if "tessera.shard.main" in child.cmdline():
                found[int(child.environ().get("RANK", "0"))] = child
    return [found[rank] for rank in sorted(found)]


def bodies() -> list[Body]:
    """Greedy, seeded, penalised and guided; with a picture and without."""
    picture = question(3, (60, 40))
    return [
        ask("[INST] one [/INST]", LENGTH, ignore_eos_token=True),
        ask("[INST] two [/INST]", LENGTH, do_sample=True, seed=7, temperature=1.3),
        ask("[INST] three [/INST]", LENGTH, repetition_penalty=1.4, frequency_penalty=0.3),
        ask("[INST] four [/INST]", LENGTH, seed=5, grammar={"type": "regex", "value": PATTERN}),
        ask(picture, LENGTH, do_sample=True, seed=11),
    ]


async def read(
    client: httpx.AsyncClient, body: Body, begun: asyncio.Event
) -> tuple[list[int], str]:
    """Ids and text of a stream; `begun` once it has given some tokens."""
    ids: list[int] = []
    text = ""
    async with client.stream("POST", "/generate_stream", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            assert "error" not in event, event
            ids.append(event["token"]["id"])
            text = event["generated_text"] or text
            if len(ids) > 5:
                begun.set()
    begun.set()
    return ids, text


async def read_all(
    stack: Stack, disturb: Callable[[], None] | None = None
) -> list[tuple[list[int], str]]:
    """All of `bodies` at once; `disturb` when each has begun, and a newcomer after that."""
    async with httpx.AsyncClient(base_url=stack.url, timeout=120, verify=False) as client:
        begun = [asyncio.Event() for _ in bodies()]
        reading = [
            asyncio.create_task(read(client, body, event))
            for body, event in zip(bodies(), begun, strict=True)
        ]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 60)
        if disturb is not None:
            disturb()
        newcomer = asyncio.create_task(read(client, ask("[INST] new [/INST]", 20), asyncio.Event()))
        return await asyncio.wait_for(asyncio.gather(*reading, newcomer), 120)


@pytest.mark.parametrize("rank", [0, 1])
def test_streams_go_on_when_a_shard_is_killed(stack: Stack, rank: int) -> None:
    expected = asyncio.run(read_all(stack))
    assert all(len(ids) > 5 for ids, _ in expected)
    assert re.fullmatch(PATTERN, expected[3][1])
    before = stack.metric("tessera_shard_restarts_total")
    old = shards_of(stack)
    found = asyncio.run(read_all(stack, old[rank].kill))
    assert found == expected
    assert stack.metric("tessera_shard_restarts_total") == before + 1
    assert not any(shard.is_running() for shard in old)
    assert len(shards_of(stack)) == 2
    stack.wait_metric("tessera_num_requests_running", 0)
    stack.wait_metric("tessera_kv_cache_used_tokens", 0)


def test_whoever_asks_the_probe_hears_of_it(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/health").status_code == 200
    time.sleep(0.3)  # nothing is under way, so nothing fails
    shards_of(stack)[1].kill()
    deadline = time.monotonic() + 60
    statuses: list[int] = []
    while statuses[-1:] != [200] or 503 not in statuses:
        statuses.append(httpx.get(f"{stack.url}/health").status_code)
        assert time.monotonic() < deadline, statuses
    assert set(statuses) == {200, 503}
    assert stack.metric('tessera_shard_up{rank="1"}') == 1
    assert stack.generate("[INST] hello [/INST]", max_new_tokens=3)


def test_a_shard_that_hangs_is_replaced(stack: Stack) -> None:
    """It holds its process and its socket, and the others wait for it."""
    stack.generate("[INST] before [/INST]", max_new_tokens=3)
    hanging = shards_of(stack)[1]
    os.kill(hanging.pid, signal.SIGSTOP)
    body = {"prompt": words(1, 20), "max_tokens": 5}
    reply = stack.post("/v1/completions", body, timeout=100)
    assert reply.status_code == 200, reply.text
    assert not hanging.is_running()


def test_a_shard_dies_while_it_is_started(stack: Stack) -> None:
    before = stack.metric("tessera_shard_restarts_total")
    first = shards_of(stack)
    first[0].kill()
    deadline = time.monotonic() + 30
    while not (second := [one for one in shards_of(stack) if one not in first]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second[0].kill()
    assert stack.generate("[INST] patience [/INST]", max_new_tokens=3)
    assert stack.metric("tessera_shard_restarts_total") == before + 1
    assert stack.log.count("All shards are started anew") >= 2
