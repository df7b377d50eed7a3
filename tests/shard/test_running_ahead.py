"""A device that is given the next step before the tokens of this one are read."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.proto.columns import sampled_tokens
from tessera.shard.backends.base import LayerCache, Recording, StepLayout
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.decode_graphs import batch_sizes
from tessera.shard.engine import Engine
from tessera.shard.launched import Launched
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.parallel import Group
from tessera.shard.warmup import warm_up
from tests.shard.test_engine import BLOCK_SIZE, POISON, TableModel, chunk, request
from tests.step_columns import DecodeRow, columns

CPU = torch.device("cpu")
LONG = 12  # tokens of an answer


class Repeated:
    """A recording that does the work again."""

    num_bytes = 1000

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


class AheadBackend(ReferenceBackend):
    """The host in the place of a device that runs ahead, and records if it is told to."""

    runs_ahead = True

    def __init__(self, records: bool = False) -> None:
        super().__init__(CPU)
        self.records = records
        self.recorded: list[Repeated] = []

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """What is recorded must not depend on the lengths that the host knew then."""
        lens = tuple(layout.context_lens_S.tolist())
        layout = replace(layout, context_lens=tuple(max(1, length) for length in lens))
        out_TNH = super().attend(q_TNH, cache, layout, window)
        for (first, last), length in zip(pairwise(layout.query_start), lens, strict=True):
            if length == 0:
                out_TNH[first:last] = 0
        return out_TNH

    def record(self, work: Callable[[], None], after: Recording | None) -> Recording | None:
        if not self.records:
            return None
        work()
        self.recorded.append(Repeated(work))
        return self.recorded[-1]


def engine_of(backend: ReferenceBackend) -> Engine:
    engine = Engine(TableModel(), Placement(backend, Group(), torch.float32), BLOCK_SIZE)
    engine.allocate_cache(40)
    return engine


SAMPLING = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 0.9, "presence_penalty": 0.4, "temperature": 0.8, "seed": 2**63},
    {"top_n_tokens": 3, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 1},
    {"logit_bias": [shard_pb2.LogitBias(token_id=3, bias=4.0)], "repetition_penalty": 0.7},
]


def prompts() -> list[shard_pb2.Chunk]:
    chunks = []
    for n, params in enumerate(SAMPLING):
        sampling = shard_pb2.SamplingParams(**params)  # type: ignore[arg-type]
        part = chunk(n, [3 + n, 5, 6], sampling=sampling)
        part.new_block_ids[:] = range(1 + 5 * n, 6 + 5 * n)  # enough for the whole answer
        chunks.append(part)
    return chunks


def steps() -> list[shard_pb2.Step]:
    """Prompts that join one after the other, then all decode; the router names no token."""
    made, chunks = [], prompts()
    for number in range(LONG + len(chunks)):
        rows = [
            DecodeRow(sequence_id=n, context_len=3 + number - n)
            for n in range(min(number, len(chunks)))
            if number - n <= LONG
        ]
        step = shard_pb2.Step(step_id=number, decodes=columns(*rows))
        step.chunks.extend(chunks[number : number + 1])
        made.append(step)
    return made


def one_by_one(engine: Engine) -> list[shard_pb2.StepReply]:
    return [engine.run(step) for step in steps()]


def one_ahead(engine: Engine) -> list[shard_pb2.StepReply]:
    replies, under_way = [], None
    for step in steps():
        following: Launched = engine.launch(step)
        if under_way is not None:
            replies.append(engine.finish(under_way))
        assert following.may_be_followed
        under_way = following
    assert under_way is not None
    return [*replies, engine.finish(under_way)]


def told(replies: list[shard_pb2.StepReply]) -> list[tuple[object, ...]]:
    return [(reply.step_id, list(sampled_tokens(reply)), list(reply.failures)) for reply in replies]


def test_tokens_are_those_of_a_host_that_reads_each_step_first() -> None:
    expected = told(one_by_one(engine_of(ReferenceBackend(CPU))))
    assert len({token.token_id for _, tokens, _ in expected for token in tokens}) > 10
    assert told(one_ahead(engine_of(AheadBackend()))) == expected


def test_recorded_steps_give_the_same_tokens() -> None:
    expected = told(one_by_one(engine_of(ReferenceBackend(CPU))))
    backend = AheadBackend(records=True)
    engine = engine_of(backend)
    assert engine.record_decodes(max_batch=8, max_context_len=40) > 0
    replayed = []
    for recording in backend.recorded:
        replay = recording.replay
        recording.replay = lambda replay=replay: (replayed.append(1), replay())  # type: ignore[misc]
    assert told(one_ahead(engine)) == expected
    assert len(replayed) == len([step for step in steps() if not step.chunks])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_recorded_steps_of_a_real_model(kind: str, checkpoint: Callable[[str], Path]) -> None:
    def real_engine(backend: ReferenceBackend) -> Engine:
        placement = Placement(backend, Group(), torch.float32)
        engine = Engine(load_model(checkpoint(kind), placement), placement, BLOCK_SIZE)
        engine.allocate_cache(40)
        return engine

    expected = told(one_by_one(real_engine(ReferenceBackend(CPU))))
    engine = real_engine(AheadBackend(records=True))
    assert engine.record_decodes(max_batch=8, max_context_len=40) > 0
    assert ids(told(one_ahead(engine))) == ids(expected)


def ids(replies: list[tuple[object, ...]]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for _, tokens, _ in replies]  # type: ignore[attr-defined]


def test_prompts_and_long_tables_are_not_replayed() -> None:
    backend = AheadBackend(records=True)
    engine = engine_of(backend)
    engine.record_decodes(max_batch=2, max_context_len=2 * BLOCK_SIZE)
    for recording in backend.recorded:
        recording.replay = lambda: pytest.fail("replayed")  # type: ignore[misc]
    engine.run(shard_pb2.Step(chunks=[chunk(0, [1, 2, 3] * 4)]))
    row = DecodeRow(sequence_id=0, context_len=13, new_block_ids=[3])
    assert engine.run(shard_pb2.Step(decodes=columns(row))).tokens.token_ids


def test_a_context_longer_than_there_must_be_room_for_is_replayed() -> None:
    backend = AheadBackend(records=True)
    engine = engine_of(backend)
    must_fit = request(max_context_len=2 * BLOCK_SIZE, longest_context_len=13, max_blocks=40)
    warm_up(engine, must_fit, memory_fraction=1.0, layout=None)
    engine.run(shard_pb2.Step(chunks=[chunk(0, [1, 2, 3] * 4)]))
    with patch.object(backend.recorded[-1], "replay") as replay:  # of one sequence
        row = DecodeRow(sequence_id=0, context_len=13, new_block_ids=[3])
        engine.run(shard_pb2.Step(decodes=columns(row)))
    replay.assert_called_once()


def test_guided_steps_are_finished_before_the_next() -> None:
    engine = engine_of(AheadBackend())
    sampling = shard_pb2.SamplingParams(guided=True)
    launched = engine.launch(shard_pb2.Step(chunks=[chunk(1, [5, 6], sampling=sampling)]))
    assert not launched.may_be_followed
    engine.masks.put(0, {1: (1 << 30).to_bytes(4, "little")})
    assert list(engine.finish(launched).tokens.token_ids) == [30]
    row = DecodeRow(sequence_id=1, context_len=3)
    following = engine.launch(shard_pb2.Step(step_id=1, decodes=columns(row)))
    engine.masks.put(1, {1: (1 << 29).to_bytes(4, "little")})
    assert list(engine.finish(following).tokens.token_ids) == [29]


def test_a_sequence_that_fails_fails_alone_though_it_was_in_the_next_step_too() -> None:
    engine = engine_of(AheadBackend())
    first = engine.launch(shard_pb2.Step(chunks=[chunk(0, [POISON]), chunk(1, [4])]))
    rows = [DecodeRow(sequence_id=n, context_len=2) for n in (0, 1)]
    second = engine.launch(shard_pb2.Step(step_id=1, decodes=columns(*rows)))
    for launched in (first, second):
        reply = engine.finish(launched)
        assert list(reply.tokens.sequence_ids)[-1] == 1
        assert 0 in [failure.sequence_id for failure in reply.failures] or launched is second


def test_sequences_that_are_released_while_a_step_is_under_way() -> None:
    engine = engine_of(AheadBackend())
    first = engine.launch(shard_pb2.Step(chunks=[chunk(0, [5]), chunk(1, [4])]))
    row = DecodeRow(sequence_id=1, context_len=2)
    step = shard_pb2.Step(step_id=1, decodes=columns(row), released_sequence_ids=[0])
    second = engine.launch(step)
    assert len(engine.finish(first).tokens.token_ids) == 2
    assert list(engine.finish(second).tokens.sequence_ids) == [1]


@pytest.mark.parametrize("max_batch", [1, 3, 8, 100, 128, 200, 256, 1000])
def test_every_batch_has_a_size_that_is_little_larger(max_batch: int) -> None:
    sizes = batch_sizes(max_batch)
    assert sizes == sorted(set(sizes)) and len(sizes) < 30
    assert sizes[-1] == min(max_batch, 256)
    for batch in range(1, sizes[-1] + 1):
        padded = next(size for size in sizes if size >= batch)
        assert padded - batch < max(3, 8 if batch <= 128 else 16)


def test_the_warm_up_counts_what_recordings_hold() -> None:
    class Small(AheadBackend):
        def free_memory_bytes(self) -> int:
            return 100_000_000

        def used_memory_bytes(self) -> int:
            return 0

        def peak_memory_bytes(self) -> int:
            return 20_000

    blocks = []
    for records in (False, True):
        backend = Small(records)
        engine = Engine(TableModel(), Placement(backend, Group(), torch.float32), BLOCK_SIZE)
        reply = warm_up(engine, request(), memory_fraction=1.0, layout=None)
        blocks.append(reply.num_blocks)
        assert len(backend.recorded) == (6 if records else 0)  # 1, 2 and 4 rows, twice
    held = 3 * Repeated.num_bytes + 4 * (256 // BLOCK_SIZE) * 4 + 4 * 32 * 4
    assert blocks[0] - blocks[1] == pytest.approx(held / engine.cache_shape.block_bytes, abs=1)
