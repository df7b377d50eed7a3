"""Writes what each model needs into docker/models/*.env; `make docs` runs it.

The numbers are those of `tessera-launcher --plan`, of configurations that are kept here.
"""

import math
from dataclasses import asdict
from pathlib import Path

from tessera.launcher.capacity import Plan, plan
from tessera.launcher.memory_plan import load_of
from tessera.launcher.settings import Settings
from tessera.shard.footprint import footprint

CONFIGS = Path(__file__).parent / "model_configs"
ENVS = Path(__file__).parents[2] / "docker" / "models"
SHARDS = (1, 2, 4)
FEW_BITS = "int4"
GIB = 1 << 30
HEAD = """\
# {name}: pictures of up to {picture_tokens} tokens.
#
# GiB of memory with the settings below and one request of MAX_TOTAL_TOKENS (written by `make docs`;
# `tessera-launcher --plan` tells those of any model):
#
#   NUM_SHARD   each GPU   with QUANTIZE=int4   a CPU's, in all   with QUANTIZE=int4
"""
TAIL = """\
#
# On one GPU each further such request takes {more:.2f} GiB; more than fit wait for each other.
"""


def needs(name: str) -> str:
    """The comment at the top of a model's file."""
    config = CONFIGS / name
    settings = Settings.read(["--env-file", str(ENVS / f"{name}.env")], {})

    def planned(shards: int, device: str, quantize: str = "") -> Plan:
        told = asdict(footprint(config, shards, device, quantize=quantize))
        return plan(told, device, load_of(settings), None)

    rows = []
    for shards in SHARDS:
        gpu, gpu_few = planned(shards, "cuda"), planned(shards, "cuda", FEW_BITS)
        cpu, cpu_few = planned(shards, "cpu"), planned(shards, "cpu", FEW_BITS)
        cells = [gpu.needed, gpu_few.needed, shards * cpu.needed, shards * cpu_few.needed]
        rows.append(f"#   {shards:>9}" + "".join(_cells(cells)))
    picture_tokens = footprint(config, 1, "cuda").picture_tokens
    one = planned(1, "cuda")
    more = (settings.router.max_total_tokens or 0) * one.kv_token / GIB
    head = HEAD.format(name=settings.router.model_id, picture_tokens=picture_tokens)
    return head + "\n".join(rows) + "\n" + TAIL.format(more=more)


def with_needs(name: str, text: str) -> str:
    """A model's file with the comment at its top, or instead of the one there."""
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return needs(name) + "".join(lines[first:])


def names() -> list[str]:
    """The models whose needs are told."""
    return sorted(path.name for path in CONFIGS.iterdir())


def _cells(sizes: list[int]) -> list[str]:
    """In GiB, rounded up."""
    widths = (11, 21, 18, 21)
    tenths = [math.ceil(size / GIB * 10) / 10 for size in sizes]
    return [f"{size:>{width}.1f}" for size, width in zip(tenths, widths, strict=True)]


if __name__ == "__main__":
    for name in names():
        path = ENVS / f"{name}.env"
        path.write_text(with_needs(name, path.read_text()))
