import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.router.blocks import BlockPool
from tessera.router.core import Core
from tessera.router.errors import GenerationError
from tessera.router.generation import ServingLimits
from tessera.router.main import run_watched
from tessera.router.metrics import Metrics
from tessera.router.scheduler import SchedulerLimits
from tessera.router.shards import ShardsLost
from tessera.router.tokenizer import Tokenizer
from tests.router.test_core import ScriptedShards, read, request


class HungShards(ScriptedShards):
    """Never answers a step; the watch finds out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def watch(self) -> None:
        await asyncio.sleep(0.05)
        raise ShardsLost("shard 0 has not answered")


def test_a_rank_that_hangs_is_noticed_and_requests_are_told(
    checkpoint: Callable[[str], Path],
) -> None:
    async def go() -> None:
        shards = HungShards()
        tokenizer = Tokenizer.from_folder(checkpoint("llama"))
        core = Core(shards, tokenizer, frozenset(), Metrics())  # type: ignore[arg-type]
        limits = ServingLimits(100, 128, 32, 640, 8)
        core.open(limits, SchedulerLimits(32, 8, 3, 0, 8), BlockPool(40, 4))
        stream = core.submit(request())
        with pytest.raises(ShardsLost) as lost:
            await asyncio.wait_for(run_watched(core, shards), 10)  # type: ignore[arg-type]
        core.lose(lost.value)
        with pytest.raises(GenerationError, match="a shard was lost"):
            await read(stream)
        assert not core.ready

    asyncio.run(go())
