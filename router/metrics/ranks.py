"""How each shard is, read from the connections to them when somebody asks."""

from collections.abc import Sequence

from tessera.router.metrics.instruments import Registry
from tessera.router.shards import RankState


class RankMetrics:
    """State and memory of every rank."""

    def __init__(self, registry: Registry) -> None:
        self._ranks: Sequence[RankState] = ()
        self._up = registry.gauges(
            "tessera_shard_up",
            "1: has loaded its weights and answers; 0: loads, or has missed an answer, or is gone",
            "rank",
        )
        self._memory = registry.gauges(
            "tessera_shard_memory_bytes",
            "Memory in use: tensors on an accelerator, the process's own on a CPU; every 5 seconds",
            "rank",
        )
        self._info = registry.gauges(
            "tessera_shard_info",
            "1; what the shard computes with",
            "rank",
            "device",
            "backend",
            "dtype",
        )

        self._losses = registry.counter(
            "tessera_shard_restarts_total", "Times that all shards were given up and started anew"
        )

    def lost(self) -> None:
        """All shards are given up for new ones."""
        self._losses.increase()

    def follow(self, ranks: Sequence[RankState]) -> None:
        """Read these from now on, in order of rank."""
        self._ranks = ranks

    def refresh(self) -> None:
        """Take the numbers as they are now."""
        for rank, state in enumerate(self._ranks):
            self._up.of(str(rank)).set(int(state.answers))
            if state.info is not None:
                info = state.info
                self._memory.of(str(rank)).set(info.used_memory_bytes)
                self._info.of(str(rank), info.device, info.backend, info.dtype).set(1)
