"""What the server takes: from what was asked for, what the model can and what the warm-up found."""

from tessera.proto import shard_pb2
from tessera.proto.env import SettingsError
from tessera.router.generation import ServingLimits
from tessera.router.model_files import ModelFiles
from tessera.router.scheduler import SchedulerLimits
from tessera.router.settings import RouterSettings
from tessera.router.shards import ShardsInfo

STEP_TILES, CPU_STEP_TILES = 8, 5
"""A picture or two of at most five tiles. Pictures that are ready all at once would fill the token
budget one after the other, and text behind them would wait (benchmark/README.md has the figures);
a device is busy with a few tiles already: each is 0.37 TFLOP for CLIP-L."""


def batch_size(settings: RouterSettings) -> int:
    """Most sequences in one step; never more than its tokens, because each needs one."""
    asked = settings.max_batch_size or settings.max_concurrent_requests
    return min(asked, settings.max_batch_prefill_tokens)


def step_tiles(settings: RouterSettings, info: ShardsInfo) -> int:
    """Most image tiles in one step: what a device encodes in about the time of a full step."""
    return settings.max_step_tiles or (CPU_STEP_TILES if info.device == "cpu" else STEP_TILES)


def scheduler_limits(settings: RouterSettings, info: ShardsInfo) -> SchedulerLimits:
    """What one step may hold."""
    return SchedulerLimits(
        max_step_tokens=settings.max_batch_prefill_tokens,
        max_batch_size=batch_size(settings),
        max_waiting_tokens=settings.max_waiting_tokens,
        waiting_served_ratio=settings.waiting_served_ratio,
        max_step_tiles=step_tiles(settings, info),
        vision_cache_tokens=settings.vision_cache_tokens,
        prefix_caching=settings.prefix_caching,
    )


def warmup_request(
    settings: RouterSettings, info: ShardsInfo, files: ModelFiles
) -> shard_pb2.WarmupRequest:
    """The worst step these settings allow, and the most cache they can use.

    Raises:
        SettingsError: MAX_TOTAL_TOKENS is longer than the model's window, or
            MAX_BATCH_TOTAL_TOKENS shorter than a block.
    """
    check_window(settings, files)
    max_total = settings.max_total_tokens or files.max_positions
    if settings.max_batch_total_tokens is not None:
        max_blocks = _asked_blocks(settings.max_batch_total_tokens, info.block_size)
    else:
        max_blocks = batch_size(settings) * -(-max_total // info.block_size)
    return shard_pb2.WarmupRequest(
        max_step_tokens=settings.max_batch_prefill_tokens,
        max_batch_size=batch_size(settings),
        max_step_tiles=step_tiles(settings, info) if files.layout else 0,
        # Without MAX_TOTAL_TOKENS a shorter window than the model's is fine.
        max_context_len=settings.max_total_tokens or min(max_total, 2 * info.block_size),
        longest_context_len=max_total,
        max_blocks=max_blocks,
        max_feature_tokens=_feature_tokens(settings, files),
    )


def check_window(settings: RouterSettings, files: ModelFiles) -> None:
    """What can be refused before the weights are loaded.

    Raises:
        SettingsError: MAX_TOTAL_TOKENS or MAX_INPUT_TOKENS is longer than the model's window.
    """
    max_total_tokens, max_input_tokens = settings.max_total_tokens, settings.max_input_tokens
    if max_input_tokens is not None and max_input_tokens >= files.max_positions:
        raise SettingsError(
            f"MAX_INPUT_TOKENS={max_input_tokens} leaves no room for an answer in the "
            f"{files.max_positions} positions of this model; lower it."
        )
    if max_total_tokens is not None and max_total_tokens > files.max_positions:
        raise SettingsError(
            f"MAX_TOTAL_TOKENS={max_total_tokens} is over the {files.max_positions} positions of "
            "this model; lower it."
        )


def _asked_blocks(max_batch_total_tokens: int, block_size: int) -> int:
    if max_batch_total_tokens < block_size:  # no blocks would ask the shards for all that fit
        raise SettingsError(
            f"MAX_BATCH_TOTAL_TOKENS={max_batch_total_tokens} is less than one block of "
            f"{block_size} tokens; raise it or lower BLOCK_SIZE."
        )
    return max_batch_total_tokens // block_size


def _feature_tokens(settings: RouterSettings, files: ModelFiles) -> int:
    """Image features the scheduler may have on the shards at once, in tokens.

    Beyond its bound there may be one picture of the sequence next in line, and one of each running
    prompt that goes on to its next picture; two stand for those here.
    """
    if files.layout is None:
        return 0
    return settings.vision_cache_tokens + 2 * files.layout.max_tokens


def serving_limits(
    settings: RouterSettings,
    info: ShardsInfo,
    files: ModelFiles,
    num_blocks: int,
) -> ServingLimits:
    """What fits, from what was asked for and what the warm-up found.

    Raises:
        SettingsError: MAX_INPUT_TOKENS does not leave room for one generated token.
    """
    capacity = num_blocks * info.block_size
    max_total = settings.max_total_tokens or min(files.max_positions, capacity)
    max_input = settings.max_input_tokens or max_total - 1
    if max_input >= max_total:
        raise SettingsError(
            f"MAX_INPUT_TOKENS={max_input} must be below the longest total of {max_total} tokens; "
            "lower it."
        )
    return ServingLimits(
        max_input_tokens=max_input,
        max_total_tokens=max_total,
        max_batch_prefill_tokens=settings.max_batch_prefill_tokens,
        max_batch_total_tokens=capacity,
        max_batch_size=batch_size(settings),
        num_shard=info.world_size,
        dtype=info.dtype,
        device=info.device,
        quantization=info.quantization,
        cache_dtype=info.cache_dtype,
    )


def cache_shortfall(settings: RouterSettings, limits: ServingLimits, block_size: int) -> str:
    """One sentence where the cache is smaller than MAX_BATCH_TOTAL_TOKENS asks for, else empty.

    Rounding down to whole blocks is no shortfall.
    """
    asked = settings.max_batch_total_tokens
    if asked is None or limits.max_batch_total_tokens > asked - block_size:
        return ""
    return (
        f"MAX_BATCH_TOTAL_TOKENS={asked} does not fit in memory: the cache holds "
        f"{limits.max_batch_total_tokens} tokens. Lower it, MAX_BATCH_PREFILL_TOKENS or "
        "MAX_BATCH_SIZE, use more shards, or let the server have more of the device's memory."
    )
