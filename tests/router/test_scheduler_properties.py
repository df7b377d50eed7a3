"""The scheduler's promises under random load, checked against a shard that keeps contents.

Every combination of end of text, maximum, cancel, preemption and failure happens with up to two
steps under way.
"""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.router.blocks import BlockPool
from tessera.router.request import (
    PlacedImage,
    PreparedImage,
    Request,
    SamplingParams,
    StoppingParams,
)
from tessera.router.scheduler import Scheduler, SchedulerLimits, StepPlan
from tessera.router.sequence import Sequence

BLOCK_SIZE = 4
IMAGE_TOKENS = 6

Content = tuple[bytes, int] | int  # what a cache slot holds: a token, or a place in a picture


@dataclass
class Load:
    """One random case."""

    limits: SchedulerLimits
    num_blocks: int
    lookahead: int
    sequences: list[Sequence]
    arrivals: list[int]  # step before which each sequence is added
    ends: list[int]  # generated tokens after which each turns out to have ended
    cancels: dict[int, int]  # index of a sequence -> step after which its client leaves
    failures: dict[int, int]  # index of a sequence -> step in which it fails


@st.composite
def loads(draw: st.DrawFn) -> Load:
    num_blocks = draw(st.integers(6, 24))
    most = num_blocks * BLOCK_SIZE
    batch = draw(st.integers(1, 5))
    count = draw(st.integers(1, 10))
    limits = SchedulerLimits(
        max_step_tokens=draw(st.integers(batch, 40)),
        max_batch_size=batch,
        max_waiting_tokens=draw(st.integers(0, 6)),
        waiting_served_ratio=draw(st.sampled_from([0, 1, 100])),
        max_step_tiles=draw(st.sampled_from([1, 4, 8])),
        vision_cache_tokens=draw(st.sampled_from([0, 6, 100])),
        prefix_caching=draw(st.booleans()),
    )
    steps = st.integers(0, 30)
    numbers = st.integers(0, count - 1)
    sequences = [draw(sequence_of(number, most)) for number in range(count)]
    return Load(
        limits,
        num_blocks,
        draw(st.integers(0, 2)),
        sequences,
        [draw(steps) for _ in sequences],
        [draw(st.integers(1, 14)) for _ in sequences],
        draw(st.dictionaries(numbers, steps, max_size=2)),
        draw(st.dictionaries(numbers, steps, max_size=2)),
    )


@st.composite
def sequence_of(draw: st.DrawFn, number: int, most: int) -> Sequence:
    prompt = draw(st.integers(1, most - 1))
    new = draw(st.integers(1, min(14, most - prompt)))
    ids = [draw(st.integers(0, 1))] * prompt  # many prompts share their beginnings
    images: tuple[PlacedImage, ...] = ()
    if prompt >= 8 and draw(st.booleans()):
        name = draw(st.integers(1, 3))
        image = PreparedImage(bytes([name] * 16), 8, 8, 3, b"", IMAGE_TOKENS)
        images = (PlacedImage(image, draw(st.integers(0, prompt - IMAGE_TOKENS))),)
    request = Request(
        tuple(ids),
        images,
        SamplingParams(),
        StoppingParams(new),
        priority=draw(st.integers(0, 1)),
        fairness_key=draw(st.sampled_from("ab")),
        use_prefix_cache=draw(st.booleans()),
    )
    return Sequence(number + 1, request)


def content_at(sequence: Sequence, tokens: list[int], position: int) -> Content:
    for placed in sequence.images_between(position, position + 1):
        return placed.image.content_hash, position - placed.offset
    return tokens[position]


def sampled_after(tokens: list[int]) -> int:
    """A model: the next token is a function of all tokens before it."""
    return (sum(tokens) * 31 + len(tokens)) % 5


@dataclass
class Shard:
    """Follows the plans as a real one would; objects to whatever it could not compute rightly."""

    slots: dict[int, Content] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    features: set[bytes] = field(default_factory=set)

    def run(self, plan: StepPlan) -> dict[int, int]:
        """One step; returns the sampled token of each sequence."""
        for number in plan.released_sequence_ids:
            del self.tokens[number], self.tables[number]
        for content_hash in plan.released_images:
            self.features.remove(content_hash)
        for image in plan.images:
            assert image.content_hash not in self.features
            self.features.add(image.content_hash)
        rows = []
        for row in plan.decodes:
            number = row.sequence.sequence_id
            if row.token_id is not None:
                self.tokens[number][row.context_len - 1 :] = [row.token_id]
            rows.append(
                (row.sequence, row.context_len - 1, row.context_len, row.new_block_ids, True)
            )
        for chunk in plan.chunks:
            number = chunk.sequence.sequence_id
            if chunk.is_start:
                assert number not in self.tokens
                self.tokens[number], self.tables[number] = [], []
                self.tokens[number] = list(chunk.sequence.token_ids[: chunk.first])
            assert len(self.tokens[number]) == chunk.first
            self.tokens[number] += chunk.sequence.token_ids[chunk.first : chunk.last]
            rows.append(
                (chunk.sequence, chunk.first, chunk.last, chunk.new_block_ids, chunk.is_last)
            )
        for sequence, first, last, blocks, _ in rows:
            self._write(sequence, first, last, blocks)
        for sequence, _, last, _, _ in rows:
            self._check(sequence, last)
        return {s.sequence_id: self._sample(s, last) for s, _, last, _, samples in rows if samples}

    def _write(self, sequence: Sequence, first: int, last: int, blocks: tuple[int, ...]) -> None:
        number = sequence.sequence_id
        self.tables[number] += blocks
        assert len(self.tables[number]) * BLOCK_SIZE >= last
        for position in range(first, last):
            content = content_at(sequence, self.tokens[number], position)
            if isinstance(content, tuple):
                assert content[0] in self.features
            self.slots[self._slot(number, position)] = content

    def _check(self, sequence: Sequence, last: int) -> None:
        """Everything this row attends to is what the sequence really says."""
        number = sequence.sequence_id
        for position in range(last):
            expected = content_at(sequence, self.tokens[number], position)
            assert self.slots[self._slot(number, position)] == expected

    def _sample(self, sequence: Sequence, last: int) -> int:
        tokens = self.tokens[sequence.sequence_id]
        token = sampled_after(tokens[:last])
        tokens.append(token)
        return token

    def _slot(self, number: int, position: int) -> int:
        block = self.tables[number][position // BLOCK_SIZE]
        assert block > 0
        return block * BLOCK_SIZE + position % BLOCK_SIZE


@settings(max_examples=400, deadline=None)
@given(loads())
def test_every_load_is_served_rightly_within_the_limits(load: Load) -> None:
    scheduler = Scheduler(load.limits, BlockPool(load.num_blocks, BLOCK_SIZE))
    shard = Shard()
    over: set[int] = set()
    under_way: deque[dict[int, int]] = deque()
    for step in range(5000):
        for index, sequence in enumerate(load.sequences):
            if load.arrivals[index] == step:
                scheduler.add(sequence)
        plan = scheduler.next_step()
        if not plan.is_empty:
            assert plan.num_tokens <= load.limits.max_step_tokens
            assert len(scheduler.running) <= load.limits.max_batch_size
            under_way.append(shard.run(plan))
        elif not under_way and step > 30:
            break
        end_early(load, scheduler, step, over)
        if len(under_way) > load.lookahead or (plan.is_empty and under_way):
            take_tokens(load, scheduler, under_way.popleft(), over)
    check_the_end(load, scheduler, shard, over)


def end_early(load: Load, scheduler: Scheduler, step: int, over: set[int]) -> None:
    for index, sequence in enumerate(load.sequences):
        cancelled = load.cancels.get(index) == step
        failed = load.failures.get(index) == step and sequence.sent_to_shards
        if (cancelled or failed) and load.arrivals[index] <= step:
            scheduler.finish(sequence, is_tainted=failed)
            over.add(sequence.sequence_id)


def take_tokens(load: Load, scheduler: Scheduler, tokens: dict[int, int], over: set[int]) -> None:
    for number, token in tokens.items():
        if number in over:
            continue
        sequence = load.sequences[number - 1]
        scheduler.append_token(sequence, token)
        end = min(sequence.request.stopping.max_new_tokens, load.ends[number - 1])
        if sequence.num_generated == end:
            scheduler.finish(sequence)
            over.add(number)


def check_the_end(load: Load, scheduler: Scheduler, shard: Shard, over: set[int]) -> None:
    assert not scheduler.running and not len(scheduler.waiting)
    assert scheduler.pool.num_free == load.num_blocks
    assert shard.tokens == {}
    assert len(shard.features) * IMAGE_TOKENS == scheduler.images.encoded_tokens
    assert scheduler.images.encoded_tokens <= load.limits.vision_cache_tokens
    assert over == {sequence.sequence_id for sequence in load.sequences}
    for sequence in load.sequences:
        for position in range(sequence.num_prompt_tokens, len(sequence.token_ids)):
            assert sequence.token_ids[position] == sampled_after(sequence.token_ids[:position])
