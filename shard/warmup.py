"""Sizes the KV cache: what the worst step needs beyond the weights, and what is left for blocks."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tessera.proto import shard_pb2
from tessera.proto.image_layout import AnyResLayout, ImageLayout
from tessera.shard.backends.base import LayerCache
from tessera.shard.backends.host_memory import return_freed_memory
from tessera.shard.batch import Batch, BatchBuilder
from tessera.shard.decode_graphs import batch_sizes
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError, is_out_of_memory
from tessera.shard.models.base import ImageTiles
from tessera.shard.sampler import SampleRow, choose

logger = logging.getLogger(__name__)

WORKSPACE_SHARE = 0.05
LEAST_WORKSPACE_BYTES = 40 << 20
"""Part of the free memory left alone, at least so much of it, for what no trial shows: messages,
fragmentation, libraries."""

HOST_TRIAL_LAYERS = 1
"""A layer's intermediates are gone before the next one, so one layer takes what all do; on a
processor the others would only take time."""

Trial = Callable[[Engine, int], int]
"""The memory a stage takes for so many tokens, tiles or sequences."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What the largest step takes beyond weights and cache, bytes."""

    vision: int  # encoding the most tiles
    forward: int  # the most tokens through the decoder
    sampling: int  # the most sequences through the head and the sampler
    features: int  # pictures' features that are kept
    recordings: int  # of decode steps, where the device repeats them

    @property
    def total(self) -> int:
        """The three stages follow each other; features and recordings stay."""
        return max(self.vision, self.forward, self.sampling) + self.features + self.recordings


def warm_up(
    engine: Engine,
    request: shard_pb2.WarmupRequest,
    memory_fraction: float,
    layout: ImageLayout | None,
) -> shard_pb2.WarmupReply:
    """Try the worst step, then allocate as many blocks as fit, at most `request.max_blocks`.

    Args:
        memory_fraction: share of the device's memory the server may use, in (0, 1].
        layout: how the model's images are tiled; None for text models.

    Raises:
        DeviceError: not even one sequence of `max_context_len` tokens fits. The message names the
            settings to lower, a value that fits and what takes the memory.
    """
    backend, group = engine.placement.backend, engine.placement.group
    weights = backend.used_memory_bytes()
    # Ranks on one host share its memory.
    sharers = group.world_size if backend.device.type == "cpu" else 1
    free = int(backend.free_memory_bytes() * memory_fraction) // sharers
    step = _try_worst_step(engine, request, layout)
    engine.allocate_cache(0)  # lets go of the trial's
    _settle(engine)
    # What the trial left behind for good: compiled primitives, workspaces, thread stacks.
    free -= max(0, backend.used_memory_bytes() - weights)
    if not _on_host(engine):  # and what torch does not count: loaded kernels, NCCL's buffers
        free = min(free, int(backend.free_memory_bytes() * memory_fraction))
    shape = engine.cache_shape
    spare = free - step.total - _workspace(free)
    num_blocks = max(0, spare) // shape.block_bytes
    if request.max_blocks:
        num_blocks = min(num_blocks, request.max_blocks)
    if num_blocks < -(-request.max_context_len // engine.block_size):
        raise DeviceError(_explain(engine, request, weights, free, step, num_blocks))
    engine.allocate_cache(num_blocks)
    engine.record_decodes(request.max_batch_size, _longest(request))
    _rehearse(engine, layout, request.max_batch_size)
    return shard_pb2.WarmupReply(
        num_blocks=num_blocks,
        block_bytes=shape.block_bytes,
        weights_bytes=weights,
        peak_step_bytes=step.total,
    )


def _workspace(free: int) -> int:
    return max(int(free * WORKSPACE_SHARE), LEAST_WORKSPACE_BYTES)


def _rehearse(engine: Engine, layout: ImageLayout | None, max_batch: int) -> None:
    """Small steps through everything: a group learns its collectives, a GPU gets its kernels.

    Kernels are compiled, and recordings brought to the device, when they are first used.
    """
    # Two tokens, as one alone is computed like a decode; a draw, as it takes a kernel of its own.
    first, ids = shard_pb2.Step(), [0, 0]
    blocks = range(1, 1 + -(-len(ids) // engine.block_size))
    first.chunks.add(token_ids=ids, new_block_ids=blocks, is_last=True, num_prompt_tokens=len(ids))
    first.chunks[0].sampling.temperature = 1.0
    if layout is not None:
        pixels = bytes(3 * layout.tile**2)
        image = {"height": layout.tile, "width": layout.tile, "num_tiles": 1, "tiles": pixels}
        first.images.add(content_hash=bytes(16), **image)
    sizes = [] if _on_host(engine) else batch_sizes(max_batch)
    with torch.inference_mode():
        for step in (first, *map(_single_tokens, sizes)):
            engine.run(step)
            engine.reset()


def _single_tokens(batch: int) -> shard_pb2.Step:
    """One token of each of `batch` sequences, which is a decode for a device."""
    step = shard_pb2.Step()
    for number in range(batch):
        step.chunks.add(
            sequence_id=number,
            token_ids=[0],
            new_block_ids=[1],
            is_last=True,
            num_prompt_tokens=1,
            sampling=shard_pb2.SamplingParams(),
        )
    return step


def _explain(
    engine: Engine,
    request: shard_pb2.WarmupRequest,
    weights: int,
    free: int,
    step: StepMemory,
    num_blocks: int,
) -> str:
    def mib(count: int) -> str:
        return f"{count / 2**20:.1f} MiB"

    needed = -(-request.max_context_len // engine.block_size) * engine.cache_shape.block_bytes
    ways_out = ["more shards (NUM_SHARD)"]
    if num_blocks:
        fitting = num_blocks * engine.block_size
        ways_out.insert(0, f"MAX_TOTAL_TOKENS={fitting}")
    # What is left for the step when the cache has what it needs, spent on tokens alone.
    room = free - _workspace(free) - needed - step.features - step.recordings
    tokens = room * request.max_step_tokens // max(1, step.forward)
    if step.forward == max(step.vision, step.forward, step.sampling) and tokens > 0:
        fitting = min(tokens, request.max_step_tokens - 1)
        ways_out.insert(0, f"MAX_BATCH_PREFILL_TOKENS={fitting}")
    return (
        f"a sequence of {request.max_context_len} tokens needs {mib(needed)} of cache, and there "
        f"is room for {num_blocks} blocks of {mib(engine.cache_shape.block_bytes)}. Memory: "
        f"{mib(weights)} in use by the weights and this process, {mib(free)} free beside them, of "
        f"which the largest step takes {mib(step.total)} ({request.max_step_tokens} prompt tokens "
        f"{mib(step.forward)}, {request.max_step_tiles} image tiles {mib(step.vision)}, sampling "
        f"for {request.max_batch_size} sequences {mib(step.sampling)}, image features "
        f"{mib(step.features)}, recorded decode steps {mib(step.recordings)}). "
        f"Try {', or '.join(ways_out)}."
    )


def _try_worst_step(
    engine: Engine, request: shard_pb2.WarmupRequest, layout: ImageLayout | None
) -> StepMemory:
    """Run the stages of the largest legal step one after the other and watch the memory."""
    vision = 0
    if layout is not None and request.max_step_tiles:
        vision = _stage(engine, "MAX_STEP_TILES", request.max_step_tiles, _vision_trial(layout))
    forward = _stage(
        engine, "MAX_BATCH_PREFILL_TOKENS", request.max_step_tokens, _forward_trial(request)
    )
    sampling = _stage(engine, "MAX_BATCH_SIZE", request.max_batch_size, _sampling_peak)
    width, dtype = engine.model.width, engine.placement.dtype
    features = request.max_feature_tokens * width * dtype.itemsize
    # Over the trial's cache, to see what they take; they are made again over the real one.
    recordings = engine.record_decodes(request.max_batch_size, _longest(request))
    return StepMemory(vision, forward, sampling, features, recordings)


def _stage(engine: Engine, setting: str, count: int, peak: Trial) -> int:
    """Memory that one stage of the largest step takes, bytes.

    Raises:
        DeviceError: it ran out of memory; the message names a smaller step that does not.
    """
    # The other ranks of a group wait in the step that failed here, so it is not tried again.
    is_single = engine.placement.group.world_size == 1
    tried = count
    while tried:
        try:
            measured = peak(engine, tried)
        except Exception as error:
            if not (isinstance(error, DeviceError) or is_out_of_memory(error)):
                raise
            tried //= 2
            if not is_single:
                break
        else:
            if tried == count:
                return measured
            break
    raise DeviceError(
        f"the device ran out of memory when a step of {setting}={count} was tried. "
        f"Try {setting}={max(1, tried)}, or more shards (NUM_SHARD)."
    )


def _vision_trial(layout: ImageLayout) -> Trial:
    def peak(engine: Engine, num_tiles: int) -> int:
        # Tiles are independent rows, so one picture tells what many take; a GPU runs them all.
        images = _blank_images(layout, 1 if _on_host(engine) else num_tiles)
        measured = _peak_of(engine, lambda: engine.model.encode_images(images))
        return measured * num_tiles // sum(image.tiles.shape[0] for image in images)

    return peak


def _forward_trial(request: shard_pb2.WarmupRequest) -> Trial:
    def peak(engine: Engine, num_tokens: int) -> int:
        engine.allocate_cache(-(-num_tokens // engine.block_size))
        # What a processor needs does not grow with the context, but its time does.
        longest = request.max_context_len if _on_host(engine) else _longest(request)
        batch = _worst_batch(engine, num_tokens, longest)
        num_layers = HOST_TRIAL_LAYERS if _on_host(engine) else engine.model.num_layers
        caches = engine.trial_caches(num_layers)
        return _peak_of(engine, lambda: _forward(engine, batch, caches))

    return peak


def _sampling_peak(engine: Engine, num_rows: int) -> int:
    return _peak_of(engine, lambda: _sample(engine, num_rows))


def _longest(request: shard_pb2.WarmupRequest) -> int:
    return max(request.longest_context_len, request.max_context_len)


def _on_host(engine: Engine) -> bool:
    return engine.placement.backend.device.type == "cpu"


def _peak_of(engine: Engine, work: Callable[[], object]) -> int:
    """Most memory `work` holds at a time, bytes; its second run is measured.

    The first one also allocates what stays: compiled primitives, workspaces, thread stacks.
    """
    backend = engine.placement.backend
    with torch.inference_mode():
        work()
        _settle(engine)
        backend.reset_peak_memory()
        before = backend.used_memory_bytes()
        work()
        backend.synchronize()
    return max(0, (backend.peak_memory_bytes() or before) - before)


def _settle(engine: Engine) -> None:
    """Until memory that is free counts as free."""
    engine.placement.backend.synchronize()
    if _on_host(engine):
        return_freed_memory()


def _worst_batch(engine: Engine, num_tokens: int, max_context_len: int) -> Batch:
    """So many prompt tokens, in sequences as long as allowed."""
    builder = BatchBuilder(engine.block_size, engine.placement.backend.device)
    chunks: list[shard_pb2.Chunk] = []
    first_block, left = 1, num_tokens
    while left > 0:
        length = min(left, max_context_len)
        num_blocks = -(-length // engine.block_size)
        if first_block + num_blocks - 1 > -(-num_tokens // engine.block_size):
            break  # a sequence's last block may be part empty; the trial cache has no more
        chunks.append(
            shard_pb2.Chunk(
                sequence_id=len(chunks),
                token_ids=[0] * length,
                new_block_ids=range(first_block, first_block + num_blocks),
                sampling=shard_pb2.SamplingParams(),
            )
        )
        first_block, left = first_block + num_blocks, left - length
    batch = builder.build(shard_pb2.Step(chunks=chunks))
    assert batch is not None
    return batch


def _forward(engine: Engine, batch: Batch, caches: list[LayerCache]) -> None:
    engine.model.forward(engine.model.embed(batch.ids_T), caches, batch.layout)


def _sample(engine: Engine, num_rows: int) -> None:
    placement = engine.placement
    hidden_RD = torch.zeros(
        num_rows, engine.model.width, dtype=placement.dtype, device=placement.backend.device
    )
    logits_RV = engine.model.logits(hidden_RD)
    if logits_RV is not None:
        every_feature = shard_pb2.SamplingParams(
            temperature=0.9, top_k=10, top_p=0.9, typical_p=0.9, repetition_penalty=1.2
        )
        rows = [SampleRow(every_feature, [0], 1)] * num_rows
        choose(logits_RV, rows, placement.backend.draw, survey=placement.backend.survey).read()


def _blank_images(layout: ImageLayout, num_tiles: int) -> list[ImageTiles]:
    """Black pictures of the size that becomes most tiles, together about `num_tiles` tiles."""
    height, width = layout.tile, layout.tile
    if isinstance(layout, AnyResLayout):
        height, width = max(layout.pinpoints, key=lambda canvas: canvas[0] * canvas[1])
    plan = layout.plan(height, width)
    tiles = torch.zeros(plan.num_tiles, layout.tile, layout.tile, 3, dtype=torch.uint8)
    image = ImageTiles(tiles, height, width, plan.grid)
    return [image] * max(1, num_tiles // plan.num_tiles)
