"""The warm-up keeps its word: the fullest load stays within the memory that was given."""

import asyncio
import base64
import re
from pathlib import Path

import httpx
import psutil
import pytest

from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "launcher" / "demo"
FRACTION = 0.01  # of the free memory: little enough that the cache fills up
MIB = 2**20


def shard_of(stack: Stack) -> psutil.Process:
    children = psutil.Process(stack.process.pid).children(recursive=True)
    return next(c for c in children if "tessera.shard.main" in " ".join(c.cmdline()))


def peak_rss_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


async def fill(stack: Stack, num_requests: int) -> list[int]:
    """Prompts as long as they may be, each its own, with and without a picture."""
    picture = base64.b64encode((DEMO / "picture.png").read_bytes()).decode()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.url, timeout=200, limits=limits) as client:

        async def ask(number: int) -> int:
            first = f"<image>{picture}</image>\n" if number % 2 else ""
            # Two tokens a word at most; what is too long is cut from the left.
            text = first + " ".join(f"red {number + n}" for n in range(330))
            body = {"inputs": text, "parameters": {"max_new_tokens": 20}}
            return (await client.post("/generate", json=body)).status_code

        return await asyncio.gather(*(ask(number) for number in range(num_requests)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read peaks from")
def test_the_fullest_load_stays_within_the_budget() -> None:
    free = psutil.virtual_memory().available
    flags = ["--num-shard", "1", "--cuda-memory-fraction", str(FRACTION)]
    with running(DEMO / "model", *flags) as stack:
        told = re.search(
            r"shard 0: (\d+) MiB in use, up to (\d+) MiB for a step, (\d+) cache blocks", stack.log
        )
        assert told
        in_use, num_blocks = int(told[1]) * MIB, int(told[3])
        assert num_blocks < 128 * 2048 // 16  # memory decides here, not what could be used
        statuses = asyncio.run(fill(stack, 128))
        assert set(statuses) == {200}
        used = stack.metric("tessera_kv_cache_kept_tokens")
        print(f"{used:.0f} tokens kept of {num_blocks * 16}")
        assert peak_rss_bytes(shard_of(stack)) <= in_use + FRACTION * free * 1.02
