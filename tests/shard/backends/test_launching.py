"""Launching a step waits for nothing on a device that runs ahead; a simulated one tells."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tessera.proto import shard_pb2
from tessera.proto.image_layout import AnyResLayout, layout_from_config
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.backends.xpu import XpuBackend
from tessera.shard.engine import Engine
from tessera.shard.launched import Launched
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group
from tests.shard.backends.pool import CPU
from tests.shard.backends.simulated_device import simulated_device
from tests.shard.backends.simulated_xpu import simulated_xpu
from tests.step_columns import DecodeRow, columns

SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 7, "top_n_tokens": 3},
    "filtered": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "typical_p": 0.95,
        "min_p": 0.01,
        "seed": 3,
    },
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
}


class AheadXpu(XpuBackend):
    """Whatever its driver promises, it is treated as one that runs ahead."""

    runs_ahead = True


def engine_of(folder: Path, backend: ReferenceBackend) -> Engine:
    placement = Placement(backend, Group(), torch.float32)
    engine = Engine(load_model(folder, placement), placement, 16)
    engine.allocate_cache(80)
    return engine


@pytest.fixture(scope="module")
def engines(checkpoint: Callable[[str], Path]) -> Iterator[tuple[Engine, Engine]]:
    folder = checkpoint("next-mistral")
    with simulated_xpu() as device:
        engines = engine_of(folder, ReferenceBackend(CPU)), engine_of(folder, AheadXpu(device))
        engines[1].run(shard_pb2.Step())  # the driver's events are tried once
        yield engines


def prompt(sequence_id: int, length: int, sampling: shard_pb2.SamplingParams) -> shard_pb2.Chunk:
    ids = [3 + (7 * sequence_id + 5 * n) % 400 for n in range(length)]
    return shard_pb2.Chunk(
        sequence_id=sequence_id,
        token_ids=ids,
        new_block_ids=range(1 + 20 * sequence_id, 21 + 20 * sequence_id),
        is_last=True,
        sampling=sampling,
        num_prompt_tokens=length,
    )


def steps(sampling: shard_pb2.SamplingParams) -> list[shard_pb2.Step]:
    """Prompts of three sequences, one of which joins later; then they decode."""
    made = [shard_pb2.Step(chunks=[prompt(n, 20 + n, sampling) for n in range(2)])]
    for number in range(1, 8):
        rows = [
            DecodeRow(sequence_id=n, context_len=20 + n + number - (3 if n == 2 else 0))
            for n in range(2 if number < 4 else 3)
        ]
        step = shard_pb2.Step(step_id=number, decodes=columns(*rows))
        if number == 3:
            step.chunks.append(prompt(2, 22, sampling))
        made.append(step)
    return made


def ahead(engine: Engine, steps: list[shard_pb2.Step]) -> tuple[list[list[int]], Counter[str]]:
    """Tokens of each step, every one launched before the one before it was read; and waits."""
    waited: Counter[str] = Counter()
    tokens: list[list[int]] = []
    under_way: Launched | None = None
    for step in steps:
        with simulated_device().waits() as waits:
            following = engine.launch(step)
        waited += waits
        if under_way is not None:
            tokens.append(list(engine.finish(under_way).tokens.token_ids))
        under_way = following
    assert under_way is not None
    tokens.append(list(engine.finish(under_way).tokens.token_ids))
    engine.reset()
    return tokens, waited


@pytest.mark.parametrize("name", SAMPLING)
def test_steps_are_launched_without_waiting(engines: tuple[Engine, Engine], name: str) -> None:
    sampling = shard_pb2.SamplingParams(**SAMPLING[name])  # type: ignore[arg-type]
    expected = [list(engines[0].run(step).tokens.token_ids) for step in steps(sampling)]
    engines[0].reset()
    tokens, waited = ahead(engines[1], steps(sampling))
    assert tokens == expected
    assert not waited


def test_pictures_are_launched_without_waiting(
    engines: tuple[Engine, Engine], checkpoint: Callable[[str], Path]
) -> None:
    layout = layout_from_config(read_config(checkpoint("next-mistral")))
    assert isinstance(layout, AnyResLayout)
    plan = layout.plan(80, 60)
    step = shard_pb2.Step(chunks=[prompt(0, plan.num_tokens, shard_pb2.SamplingParams())])
    step.chunks[0].images.add(content_hash=b"p" * 16, length=plan.num_tokens)
    pixels = bytes(n % 251 for n in range(3 * layout.tile**2 * plan.num_tiles))
    step.images.add(
        content_hash=b"p" * 16,
        height=80,
        width=60,
        num_tiles=plan.num_tiles,
        tiles=pixels,
        grid_rows=plan.grid[0],
        grid_columns=plan.grid[1],
    )
    expected = [list(engines[0].run(step).tokens.token_ids)]
    engines[0].reset()
    assert ahead(engines[1], [step]) == (expected, Counter())
