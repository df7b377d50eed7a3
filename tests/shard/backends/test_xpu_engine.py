"""A whole engine on the simulated Intel GPU, step for step beside one on the processor."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tessera.proto import shard_pb2
from tessera.proto.columns import sampled_tokens
from tessera.proto.image_layout import AnyResLayout, layout_from_config
from tessera.shard.backends.base import Backend
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.backends.xpu import XpuBackend
from tessera.shard.engine import Engine
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group
from tessera.shard.warmup import warm_up
from tests.shard.backends.pool import CPU
from tests.shard.backends.simulated_device import simulated_device
from tests.shard.backends.simulated_xpu import simulated_xpu
from tests.step_columns import DecodeRow, columns

BLOCK_SIZE = 16
BLOCKS_EACH = 20  # of a sequence
PICTURE = (80, 60)  # height and width, pixels
HASH = b"p" * 16
SAMPLED = shard_pb2.SamplingParams(temperature=0.8, seed=7, top_n_tokens=3)


@pytest.fixture(scope="module")
def engines(checkpoint: Callable[[str], Path]) -> Iterator[tuple[Engine, Engine]]:
    """One on the processor, one on the simulated GPU; both are empty between tests."""
    folder = checkpoint("next-mistral")
    with simulated_xpu() as device:
        yield _engine(folder, ReferenceBackend(CPU)), _engine(folder, XpuBackend(device))


def _engine(folder: Path, backend: Backend) -> Engine:
    place = Placement(backend, Group(), torch.float32)
    engine = Engine(load_model(folder, place), place, BLOCK_SIZE)
    engine.allocate_cache(4 * BLOCKS_EACH)
    return engine


@pytest.fixture
def both(engines: tuple[Engine, Engine]) -> Iterator[Callable[[shard_pb2.Step], None]]:
    """Compute a step on both engines and compare what they say."""

    def run(step: shard_pb2.Step) -> None:
        expected, got = (engine.run(step) for engine in engines)
        num_last = sum(chunk.is_last for chunk in step.chunks)
        ours, right = list(sampled_tokens(got)), list(sampled_tokens(expected))
        assert len(ours) == len(step.decodes.sequence_ids) + num_last
        assert not got.failures
        assert [token[:2] for token in ours] == [token[:2] for token in right]
        for token, other in zip(ours, right, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            tops = ([top.token_id for top in one.top_tokens] for one in (token, other))
            assert next(tops) == next(tops)

    yield run
    for engine in engines:
        engine.reset()


def blocks(sequence_id: int, first: int, last: int) -> list[int]:
    """Of positions [first, last), those that are new."""
    begin = 1 + sequence_id * BLOCKS_EACH
    return list(range(begin - (-first // BLOCK_SIZE), begin - (-last // BLOCK_SIZE)))


def chunk(
    sequence_id: int, ids: list[int], first: int = 0, is_last: bool = True
) -> shard_pb2.Chunk:
    return shard_pb2.Chunk(
        sequence_id=sequence_id,
        first_position=first,
        token_ids=ids,
        new_block_ids=blocks(sequence_id, first, first + len(ids)),
        is_last=is_last,
        sampling=SAMPLED if sequence_id else shard_pb2.SamplingParams(),
        num_prompt_tokens=first + len(ids),
    )


def decode(sequence_id: int, context_len: int) -> DecodeRow:
    new = blocks(sequence_id, context_len - 1, context_len)
    return DecodeRow(sequence_id=sequence_id, context_len=context_len, new_block_ids=new)


def picture(layout: AnyResLayout) -> shard_pb2.Image:
    plan = layout.plan(*PICTURE)
    pixels = torch.Generator().manual_seed(1)
    shape = (plan.num_tiles, layout.tile, layout.tile, 3)
    tiles = torch.randint(256, shape, generator=pixels, dtype=torch.uint8)
    return shard_pb2.Image(
        content_hash=HASH,
        height=PICTURE[0],
        width=PICTURE[1],
        num_tiles=plan.num_tiles,
        tiles=tiles.numpy().tobytes(),
        grid_rows=plan.grid[0],
        grid_columns=plan.grid[1],
    )


@pytest.fixture
def layout(checkpoint: Callable[[str], Path]) -> AnyResLayout:
    found = layout_from_config(read_config(checkpoint("next-mistral")))
    assert isinstance(found, AnyResLayout)
    return found


def test_prefill_and_decode(both: Callable[[shard_pb2.Step], None]) -> None:
    both(shard_pb2.Step(chunks=[chunk(0, list(range(3, 40)))]))
    both(shard_pb2.Step(decodes=columns(decode(0, 38)), chunks=[chunk(1, list(range(50, 70)))]))
    for n in range(15):
        both(shard_pb2.Step(decodes=columns(decode(0, 39 + n), decode(1, 21 + n))))


def test_a_picture_in_two_chunks(
    both: Callable[[shard_pb2.Step], None], layout: AnyResLayout
) -> None:
    count = layout.plan(*PICTURE).num_tokens
    cut = count // 2
    first, rest = chunk(0, [1] + [5] * cut, is_last=False), chunk(0, [5] * (count - cut), cut + 1)
    first.images.add(content_hash=HASH, offset=1, first_feature=0, length=cut)
    rest.images.add(content_hash=HASH, offset=0, first_feature=cut, length=count - cut)
    both(shard_pb2.Step(images=[picture(layout)], chunks=[first]))
    both(shard_pb2.Step(chunks=[rest]))
    both(shard_pb2.Step(decodes=columns(decode(0, count + 2))))


def test_scores_of_a_prompt(both: Callable[[shard_pb2.Step], None]) -> None:
    scored = chunk(1, list(range(3, 30)))
    scored.sampling.prompt_logprobs = True
    both(shard_pb2.Step(chunks=[scored]))


FILTERED = shard_pb2.SamplingParams(temperature=0.5, top_k=5, top_p=0.9, repetition_penalty=1.2)
WAYS = pytest.mark.parametrize(
    "parameters",
    [shard_pb2.SamplingParams(), FILTERED, SAMPLED],
    ids=["greedy", "filtered", "with alternatives"],
)


def start(engine: Engine, parameters: shard_pb2.SamplingParams) -> None:
    """Prompts of three sequences, of 17, 18 and 19 tokens."""
    chunks = [chunk(n, list(range(3, 20 + n))) for n in range(3)]
    for each in chunks:
        each.sampling.CopyFrom(parameters)
    assert len(engine.run(shard_pb2.Step(chunks=chunks)).tokens.token_ids) == 3


def decodes(n: int) -> shard_pb2.Step:
    """Step n after `start`."""
    return shard_pb2.Step(decodes=columns(*[decode(s, 18 + s + n) for s in range(3)]))


@WAYS
def test_a_decode_step_waits_for_its_end_alone(
    engines: tuple[Engine, Engine], parameters: shard_pb2.SamplingParams
) -> None:
    """Neither the lengths of sequences nor what is sampled is read on the way.

    The end of a step is waited for with its tokens, then for the times of its three stages.
    """
    engine = engines[1]
    start(engine, parameters)
    for n in range(4):
        with simulated_device().waits() as launching:
            launched = engine.launch(decodes(n))
        with simulated_device().waits() as finishing:
            assert len(engine.finish(launched).tokens.token_ids) == 3
        assert not launching
        assert finishing == {"xpu.py: event": 4}
    engine.reset()


@WAYS
def test_steps_launched_before_the_tokens_of_the_last_are_read(
    engines: tuple[Engine, Engine], parameters: shard_pb2.SamplingParams
) -> None:
    """What has not been waited for is garbage on the host, so it must not be looked at."""
    on_cpu, on_xpu = engines
    for engine in engines:
        start(engine, parameters)
    expected = [on_cpu.run(decodes(n)).tokens for n in range(6)]
    launched, got = on_xpu.launch(decodes(0)), []
    for n in range(1, 6):
        following = on_xpu.launch(decodes(n))
        got.append(on_xpu.finish(launched).tokens)
        launched = following
    got.append(on_xpu.finish(launched).tokens)
    assert [list(step.token_ids) for step in got] == [list(step.token_ids) for step in expected]
    for engine in engines:
        engine.reset()


def warmed_up(
    engine: Engine, layout: AnyResLayout, free: Sequence[int], max_blocks: int = 0
) -> int:
    """Blocks of the cache, where so many bytes are free before and after the trial."""
    request = shard_pb2.WarmupRequest(
        max_step_tokens=64,
        max_context_len=64,
        max_step_tiles=2,
        max_batch_size=2,
        max_feature_tokens=64,
        max_blocks=max_blocks,
    )
    with patch.object(XpuBackend, "free_memory_bytes", side_effect=free):
        return warm_up(engine, request, 1.0, layout).num_blocks


def test_the_warm_up_leaves_no_kernel_unused(
    checkpoint: Callable[[str], Path], layout: AnyResLayout
) -> None:
    with simulated_xpu() as device:
        engine = _engine(checkpoint("next-mistral"), XpuBackend(device))
        with patch.object(engine.model, "forward", wraps=engine.model.forward) as forward:
            assert warmed_up(engine, layout, [8 << 30, 8 << 30], max_blocks=30) == 30
    assert engine.trial_caches(1)[0].k_BKPH.device == simulated_device().device
    # At the end: a prompt, then decodes of all sizes.
    rehearsed = [call.args[2].query_start for call in forward.call_args_list[-3:]]
    assert rehearsed == [(0, 2), (0, 1), (0, 1, 2)]


def test_memory_that_is_gone_after_the_trial_is_not_given_to_the_cache(
    checkpoint: Callable[[str], Path], layout: AnyResLayout
) -> None:
    with simulated_xpu() as device:
        engine = _engine(checkpoint("next-mistral"), XpuBackend(device))
        before, after = 1 << 30, 500 << 20
        blocks = [
            warmed_up(engine, layout, free)
            for free in ((before, before), (before, after), (after, after))
        ]
    assert blocks[0] > blocks[1] == blocks[2]
