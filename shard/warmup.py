"""Sizes the KV cache: what the worst step needs beyond the weights, and what is left for blocks."""

import logging

import torch

from tessera.proto import shard_pb2
from tessera.proto.image_layout import AnyResLayout, ImageLayout
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError
from tessera.shard.models.base import ImageTiles

logger = logging.getLogger(__name__)

CPU_TRIAL_TOKENS = 64
"""A processor has no separate memory to measure: a short trial step warms its kernels up, and the
worst step's memory is estimated instead. (A full one would take minutes for a large model.)"""

WORKSPACE_SHARE = 0.05
"""Part of the free memory left alone for what no trial step shows: fragmentation, libraries."""


def warm_up(
    engine: Engine, request: shard_pb2.WarmupRequest, memory_fraction: float, layout: ImageLayout | None
) -> shard_pb2.WarmupReply:
    """Run a trial step, then allocate as many blocks as fit, at most `request.max_blocks`.

    Args:
        memory_fraction: share of the device's memory the server may use, in (0, 1].
        layout: how the model's images are tiled; None for text models.

    Raises:
        DeviceError: not even one sequence of `max_context_len` tokens fits. The message names the
            settings to lower.
    """
    backend, group = engine.placement.backend, engine.placement.group
    on_host = backend.device.type == "cpu"
    free_before = backend.free_memory_bytes()
    measured = _run_trial(engine, request, layout, on_host)
    peak = max(measured, _estimate(engine, request)) if on_host else measured
    # Ranks on one host share its memory.
    free = int(free_before * memory_fraction) // (group.world_size if on_host else 1)
    spare = free - peak - int(free * WORKSPACE_SHARE)
    block_bytes = engine.cache_shape.block_bytes
    num_blocks = max(0, spare) // block_bytes
    if request.max_blocks:
        num_blocks = min(num_blocks, request.max_blocks)
    needed = -(-request.max_context_len // engine.block_size)
    if num_blocks < needed:
        raise DeviceError(
            f"one sequence of MAX_TOTAL_TOKENS={request.max_context_len} needs {needed} blocks of "
            f"{block_bytes} bytes, but {free / 2**20:.0f} MiB are free and the largest step takes "
            f"{peak / 2**20:.0f} MiB of them, which leaves {num_blocks} blocks. Set MAX_TOTAL_TOKENS "
            f"to at most {num_blocks * engine.block_size}, or lower MAX_BATCH_PREFILL_TOKENS="
            f"{request.max_step_tokens}, or use more shards (NUM_SHARD)."
        )
    engine.allocate_cache(num_blocks)
    return shard_pb2.WarmupReply(
        num_blocks=num_blocks, block_bytes=block_bytes, peak_step_bytes=peak
    )


def _run_trial(
    engine: Engine, request: shard_pb2.WarmupRequest, layout: ImageLayout | None, on_host: bool
) -> int:
    """Compute a step on a throw-away cache; returns the memory it took, bytes."""
    tokens = min(request.max_step_tokens, request.max_context_len)
    tiles = request.max_step_tiles
    if on_host:
        tokens, tiles = min(tokens, CPU_TRIAL_TOKENS), min(tiles, 1)
    num_blocks = -(-tokens // engine.block_size)
    engine.allocate_cache(num_blocks)
    backend = engine.placement.backend
    backend.synchronize()
    backend.reset_peak_memory()
    before = backend.peak_memory_bytes() or 0
    if layout is not None:
        with torch.inference_mode():
            engine.model.encode_images(_blank_images(layout, tiles))
    chunk = shard_pb2.Chunk(
        sequence_id=0,
        token_ids=[0] * tokens,
        new_block_ids=range(1, num_blocks + 1),
        is_last=True,
        sampling=shard_pb2.SamplingParams(temperature=1.0, top_p=0.9, top_k=10),
        num_prompt_tokens=tokens,
    )
    engine.run(shard_pb2.Step(chunks=[chunk]))
    engine.reset()
    backend.synchronize()
    return (backend.peak_memory_bytes() or before) - before


def _estimate(engine: Engine, request: shard_pb2.WarmupRequest) -> int:
    """Activations of the largest step: about eight float32 copies of its widest intermediates."""
    width = max(engine.model.vocab_size // 8, 4 * engine.model.head_size)
    logits = 4 * request.max_batch_size * engine.model.vocab_size * 4
    return request.max_step_tokens * width * 4 * 8 + logits


def _blank_images(layout: ImageLayout, num_tiles: int) -> list[ImageTiles]:
    """Black pictures of the size that becomes most tiles, together about `num_tiles` tiles."""
    height, width = layout.tile, layout.tile
    if isinstance(layout, AnyResLayout):
        height, width = max(layout.pinpoints, key=lambda canvas: canvas[0] * canvas[1])
    per_image = layout.plan(height, width).num_tiles
    tiles = torch.zeros(per_image, layout.tile, layout.tile, 3, dtype=torch.uint8)
    return [ImageTiles(tiles, height, width)] * max(1, num_tiles // per_image)
