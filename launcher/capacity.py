"""How much fits: a model's footprint and a device's memory in, tokens of cache out. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 1 << 20
WORKSPACE_SHARE = 0.05  # of the free memory, which the warm-up leaves alone
PROCESS_BYTES = {"cpu": 280 * MIB, "cuda": 500 * MIB, "xpu": 500 * MIB}  # of a shard without model
STEP_TILES = {"cpu": 5}  # without MAX_STEP_TILES
DEFAULT_STEP_TILES = 8


@dataclass(frozen=True, slots=True)
class Load:
    """The largest step and the longest sequence that the settings allow."""

    step_tokens: int  # MAX_BATCH_PREFILL_TOKENS
    batch_size: int  # sequences in a step
    step_tiles: int | None  # MAX_STEP_TILES
    vision_cache_tokens: int  # VISION_CACHE_TOKENS
    total_tokens: int | None  # MAX_TOTAL_TOKENS
    batch_total_tokens: int | None = None  # MAX_BATCH_TOTAL_TOKENS


@dataclass(frozen=True, slots=True)
class Plan:
    """What one number of shards needs, in bytes per shard, and what then fits."""

    shards: int
    weights: int
    process: int
    step: int  # the largest step beside weights and cache, estimated
    kv_token: int
    needed: int  # for one sequence of the longest length, the least to start with
    cache_tokens: int | None  # tokens that fit in the memory; None: no memory was named
    sequences: int | None  # of the longest length at once

    @property
    def fits(self) -> bool | None:
        """Whether the server starts with it."""
        return None if self.sequences is None else self.sequences > 0


def plan(footprint: Mapping[str, Any], device: str, load: Load, memory: int | None) -> Plan:
    """What one footprint (`tessera.shard.footprint`) means under a load.

    Args:
        memory: bytes the server may use: of each accelerator, or of the host for all its shards.
    """
    shards = footprint["world_size"]
    process, weights = PROCESS_BYTES[device], footprint["weights"]
    step, kv_token = step_bytes(footprint, device, load), footprint["kv_token"]
    longest = load.total_tokens or footprint["max_positions"]
    floor = weights + process + int((step + longest * kv_token) / (1 - WORKSPACE_SHARE))
    if memory is None:
        return Plan(shards, weights, process, step, kv_token, floor, None, None)
    each = memory // shards if device == "cpu" else memory
    free = each - weights - process
    tokens = max(0, int(free * (1 - WORKSPACE_SHARE)) - step) // kv_token
    tokens = min(tokens, load.batch_total_tokens or load.batch_size * longest)
    return Plan(shards, weights, process, step, kv_token, floor, tokens, tokens // longest)


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
    return max(stages) + features * footprint["feature_token"]


def as_json(facts: Mapping[str, Any], plans: Sequence[Plan]) -> dict[str, Any]:
    """The report for programs; sizes in bytes."""
    return {**facts, "shards": [asdict(plan) | {"fits": plan.fits} for plan in plans]}


def as_text(facts: Mapping[str, Any], plans: Sequence[Plan]) -> str:
    """The report for people; sizes in GiB, per shard."""
    lines = [
        f"{facts['model']}: {facts['model_type']}, {facts['parameters'] / 1e9:.2f} billion numbers "
        f"in {facts['dtype']}{facts['quantized']}, on {facts['device']}",
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
            f"{each.kv_token / 1024:>9.0f}  {_gib(each.needed)}  {fits}"
        )
    lines += ["", "GiB per shard. `step` is an estimate; `needed` is the least to start with."]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):>7.2f}"
