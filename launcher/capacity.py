"""How much fits: a model's footprint and a device's memory in, tokens of cache out. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

MIB = 1 << 20
# The warm-up leaves so much of the free memory alone, and at least so many bytes.
WORKSPACE_SHARE, LEAST_WORKSPACE = 0.05, 40 * MIB
PROCESS_BYTES = {"cpu": 280 * MIB, "cuda": 500 * MIB, "xpu": 500 * MIB}  # of a shard without model
OTHER_BYTES = {"cpu": 220 * MIB}  # launcher and router, where they share the shards' memory
STEP_TILES = {"cpu": 5}  # without MAX_STEP_TILES
DEFAULT_STEP_TILES = 8
START_BLOCKS = 2  # the server starts with so little cache where MAX_TOTAL_TOKENS asks for nothing


@dataclass(frozen=True, slots=True)
class Load:
    """The largest step and the longest sequence that the settings allow."""

    step_tokens: int  # MAX_BATCH_PREFILL_TOKENS
    batch_size: int  # sequences in a step
    step_tiles: int | None  # MAX_STEP_TILES
    vision_cache_tokens: int  # VISION_CACHE_TOKENS
    total_tokens: int | None  # MAX_TOTAL_TOKENS
    batch_total_tokens: int | None = None  # MAX_BATCH_TOTAL_TOKENS
    block_size: int = 16  # BLOCK_SIZE
    memory_fraction: float = 1.0  # CUDA_MEMORY_FRACTION


@dataclass(frozen=True, slots=True)
class Plan:
    """What one number of shards needs, in bytes per shard, and what then fits."""

    shards: int
    weights: int
    process: int  # beside weights, cache and step
    step: int  # the largest step, estimated
    kv_token: int
    needed: int  # with cache for one sequence of the longest length
    cache_tokens: int | None = None  # tokens that fit in the memory; None: no memory was named
    sequences: int | None = None  # of the longest length at once
    fits: bool | None = None  # whether the server starts


def plan(footprint: Mapping[str, Any], device: str, load: Load, memory: int | None) -> Plan:
    """What one footprint (`tessera.shard.footprint`) means under a load.

    Args:
        memory: bytes there are for the server: of each accelerator, or of the host for all of it.
    """
    shards, weights = footprint["world_size"], footprint["weights"]
    process = PROCESS_BYTES[device] + OTHER_BYTES.get(device, 0) // shards
    step, kv_token = step_bytes(footprint, device, load), footprint["kv_token"]
    block = load.block_size
    longest = load.total_tokens or footprint["max_positions"]
    blocks = -(-longest // block)  # of one sequence
    used = step + blocks * block * kv_token
    free = max(used / (1 - WORKSPACE_SHARE), used + LEAST_WORKSPACE) / load.memory_fraction
    needed = weights + process + int(free)
    told = Plan(shards, weights, process, step, kv_token, needed)
    if memory is None:
        return told
    each = memory // shards if device == "cpu" else memory
    free = (each - weights - process) * load.memory_fraction
    room = int(free - max(free * WORKSPACE_SHARE, LEAST_WORKSPACE)) - step
    asked = load.batch_total_tokens
    most = asked // block if asked else load.batch_size * blocks
    found = min(max(0, room) // (kv_token * block), most)
    least = blocks if load.total_tokens else min(blocks, START_BLOCKS)
    return replace(told, cache_tokens=found * block, sequences=found // blocks, fits=found >= least)


def step_bytes(footprint: Mapping[str, Any], device: str, load: Load) -> int:
    """What the largest step takes: its stages follow each other, the pictures' features stay."""
    tiles = load.step_tiles or STEP_TILES.get(device, DEFAULT_STEP_TILES)
    stages = (
        tiles * footprint["vision_tile"] if footprint["picture_tokens"] else 0,
        load.step_tokens * footprint["forward_token"],
        load.batch_size * footprint["sampling_row"],
    )
    # As the router counts them: two running prompts each go on to a next picture.
    features = load.vision_cache_tokens + 2 * footprint["picture_tokens"]
    return int(max(stages) + features * footprint["feature_token"])


def as_json(facts: Mapping[str, Any], plans: Sequence[Plan]) -> dict[str, Any]:
    """The report for programs; sizes in bytes."""
    return {**facts, "shards": [asdict(plan) for plan in plans]}


def as_text(facts: Mapping[str, Any], plans: Sequence[Plan]) -> str:
    """The report for people; sizes in GiB, per shard."""
    rounded = f" (QUANTIZE={facts['quantize']})" if facts["quantize"] else ""
    lines = [
        f"{facts['model']}: {facts['model_type']}, {facts['parameters'] / 1e6:,.1f} million "
        f"parameters in {facts['dtype']}{rounded}, on {facts['device']}",
        f"longest sequence {facts['total_tokens']} tokens"
        + (f", a picture up to {facts['picture_tokens']}" if facts["picture_tokens"] else ""),
        "",
        "shards  weights     step  KiB/token   needed  fits: tokens  sequences",
    ]
    for each in plans:
        fits = f"{'-':>12}  {'-':>9}"
        if each.cache_tokens is not None:
            fits = f"{each.cache_tokens:>12}  {each.sequences:>9}" if each.fits else "  not enough"
        lines.append(
            f"{each.shards:>6}  {_gib(each.weights)}  {_gib(each.step)}  "
            f"{each.kv_token / 1024:>9.1f}  {_gib(each.needed)}  {fits}"
        )
    lines += [
        "",
        "GiB per shard. step: the largest one, an estimate. needed: with one longest sequence.",
    ]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):>7.2f}"
