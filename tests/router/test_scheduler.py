"""The scheduler's rules one by one, then its promises under random load."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.router.blocks import BlockPool
from tessera.router.request import PlacedImage, PreparedImage, Request, SamplingParams, StoppingParams
from tessera.router.scheduler import Scheduler, SchedulerLimits, StepPlan
from tessera.router.sequence import Sequence

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 64, **changes: float) -> Scheduler:
    values: dict[str, float] = {
        "max_step_tokens": 32,
        "max_batch_size": 8,
        "max_waiting_tokens": 3,
        "waiting_served_ratio": 100.0,
        "max_step_tiles": 8,
    }
    limits = SchedulerLimits(**(values | changes))  # type: ignore[arg-type]
    return Scheduler(limits, BlockPool(num_blocks, BLOCK_SIZE))


def make_image(name: int, num_tokens: int = 6, num_tiles: int = 3) -> PreparedImage:
    return PreparedImage(bytes([name] * 16), 8, 8, num_tiles, b"", num_tokens)


def make_sequence(
    sequence_id: int,
    prompt_tokens: int = 4,
    max_new_tokens: int = 4,
    images: tuple[PlacedImage, ...] = (),
) -> Sequence:
    request = Request(
        tuple(range(prompt_tokens)), images, SamplingParams(), StoppingParams(max_new_tokens)
    )
    return Sequence(sequence_id, request)


def sample_all(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the core does after a step: one token for every sampling row, end where it ends."""
    sampling = [row.sequence for row in plan.decodes]
    sampling += [chunk.sequence for chunk in plan.chunks if chunk.is_last]
    for sequence in sampling:
        scheduler.append_token(sequence, 7)
        if sequence.num_generated >= sequence.request.stopping.max_new_tokens:
            scheduler.finish(sequence)


def run(scheduler: Scheduler, steps: int) -> Iterator[StepPlan]:
    for _ in range(steps):
        plan = scheduler.next_step()
        yield plan
        sample_all(scheduler, plan)


def started(plan: StepPlan) -> list[int]:
    return [chunk.sequence.sequence_id for chunk in plan.chunks if chunk.is_start]


def test_idle_scheduler_has_nothing_to_do() -> None:
    assert make_scheduler().next_step().is_empty


def test_prefill_and_decode_share_a_step() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0)
    scheduler.add(make_sequence(1))
    sample_all(scheduler, scheduler.next_step())
    scheduler.add(make_sequence(2))

    plan = scheduler.next_step()

    assert [row.sequence.sequence_id for row in plan.decodes] == [1]
    assert started(plan) == [2]


def test_long_prompt_is_cut_into_chunks_that_fill_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=10)
    scheduler.add(make_sequence(1, prompt_tokens=25, max_new_tokens=1))
    chunks = [(c.first, c.last, c.is_last) for plan in run(scheduler, 3) for c in plan.chunks]
    assert chunks == [(0, 10, False), (10, 20, False), (20, 25, True)]


@pytest.mark.parametrize("max_waiting_tokens", [1, 3, 7])
def test_lone_request_is_let_in_after_max_waiting_tokens_decodes(max_waiting_tokens: int) -> None:
    scheduler = make_scheduler(max_waiting_tokens=max_waiting_tokens)
    scheduler.add(make_sequence(1, max_new_tokens=50))
    sample_all(scheduler, scheduler.next_step())
    scheduler.add(make_sequence(2))

    plans = list(run(scheduler, max_waiting_tokens + 1))

    assert [started(plan) for plan in plans] == [[]] * max_waiting_tokens + [[2]]


def test_enough_waiting_requests_are_let_in_at_once() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0.5)
    for n in range(4):
        scheduler.add(make_sequence(n, max_new_tokens=50))
    sample_all(scheduler, scheduler.next_step())
    scheduler.add(make_sequence(8))
    plan = scheduler.next_step()
    assert started(plan) == []  # 1 waits, 4 run: below the ratio
    sample_all(scheduler, plan)
    scheduler.add(make_sequence(9))
    assert started(scheduler.next_step()) == [8, 9]


def test_batch_size_is_never_exceeded() -> None:
    scheduler = make_scheduler(max_batch_size=2, waiting_served_ratio=0)
    for n in range(5):
        scheduler.add(make_sequence(n))
    for _ in run(scheduler, 30):
        assert len(scheduler.running) <= 2
    assert not scheduler.running and not scheduler.waiting


def test_dry_pool_preempts_the_youngest_which_is_rebuilt_later() -> None:
    scheduler = make_scheduler(num_blocks=5, waiting_served_ratio=0)
    old, young = make_sequence(1, 4, 12), make_sequence(2, 4, 12)
    scheduler.add(old)
    scheduler.add(young)
    chunks: list[tuple[int, int, int]] = []
    released: list[int] = []
    for plan in run(scheduler, 60):
        chunks += [(c.sequence.sequence_id, c.first, c.last) for c in plan.chunks]
        released += plan.released_sequence_ids
    assert scheduler.num_preemptions >= 1
    rebuilt = [chunk for chunk in chunks if chunk[0] == 2]
    assert len(rebuilt) >= 2 and rebuilt[1][1] == 0 and rebuilt[1][2] > 4
    assert released.count(2) == len(rebuilt)  # once for each start
    assert (old.num_generated, young.num_generated) == (12, 12)
    assert scheduler.pool.num_free == 5


def test_cancelled_sequence_gives_its_blocks_back_at_once_and_is_released_in_the_next_step() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1, prompt_tokens=20)
    scheduler.add(sequence)
    scheduler.next_step()
    scheduler.finish(sequence)
    assert scheduler.pool.num_free == 64
    assert scheduler.next_step().released_sequence_ids == [1]
    assert scheduler.next_step().is_empty


def test_waiting_sequence_can_be_cancelled_before_the_shards_heard_of_it() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1)
    scheduler.add(sequence)
    scheduler.finish(sequence)
    assert scheduler.next_step().is_empty


def test_same_picture_of_two_requests_is_encoded_once_and_released_after_the_last() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0)
    for n in (1, 2):
        placed = PlacedImage(make_image(5), offset=2)
        scheduler.add(make_sequence(n, prompt_tokens=10, max_new_tokens=1, images=(placed,)))
    first = scheduler.next_step()
    assert [image.content_hash[0] for image in first.images] == [5]
    assert first.released_images == []  # still read by this very step
    sample_all(scheduler, first)
    assert [h[0] for h in scheduler.next_step().released_images] == [5]


def test_pictures_of_all_that_may_join_are_encoded_together() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0, max_step_tokens=12)
    for n in (1, 2):
        placed = PlacedImage(make_image(n), offset=0)
        scheduler.add(make_sequence(n, prompt_tokens=10, images=(placed,)))
    plan = scheduler.next_step()
    assert [image.content_hash[0] for image in plan.images] == [1, 2]


def test_tile_budget_postpones_a_picture_but_not_the_text_before_it() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0, max_step_tiles=4)
    for n in (1, 2):
        placed = PlacedImage(make_image(n), offset=3)
        scheduler.add(make_sequence(n, prompt_tokens=10, images=(placed,)))
    plan = scheduler.next_step()
    assert [(c.sequence.sequence_id, c.first, c.last) for c in plan.chunks] == [(1, 0, 10), (2, 0, 3)]
    sample_all(scheduler, plan)
    plan = scheduler.next_step()
    assert [image.content_hash[0] for image in plan.images] == [2]
    assert [(c.sequence.sequence_id, c.first, c.last) for c in plan.chunks] == [(2, 3, 10)]


def test_picture_larger_than_the_tile_budget_is_still_encoded() -> None:
    scheduler = make_scheduler(max_step_tiles=1)
    placed = PlacedImage(make_image(1), offset=0)
    scheduler.add(make_sequence(1, prompt_tokens=10, images=(placed,)))
    assert len(scheduler.next_step().images) == 1


def test_picture_at_the_very_end_of_a_prompt_is_never_computed_as_a_decode() -> None:
    scheduler = make_scheduler(max_step_tokens=9)
    placed = PlacedImage(make_image(1), offset=4)
    scheduler.add(make_sequence(1, prompt_tokens=10, images=(placed,)))
    plans = list(run(scheduler, 2))
    assert [(c.first, c.last) for plan in plans for c in plan.chunks] == [(0, 9), (9, 10)]
    assert plans[1].decodes == []


def test_a_block_cannot_come_back_twice() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(ValueError, match="twice"):
        pool.free(blocks)


@st.composite
def loads(draw: st.DrawFn) -> tuple[dict[str, int], list[Sequence], list[int], int]:
    num_blocks = draw(st.integers(6, 24))
    most = num_blocks * BLOCK_SIZE
    sequences = []
    for n in range(draw(st.integers(1, 10))):
        prompt = draw(st.integers(1, most - 1))
        new = draw(st.integers(1, min(12, most - prompt)))
        images: tuple[PlacedImage, ...] = ()
        if prompt >= 8 and draw(st.booleans()):
            offset = draw(st.integers(0, prompt - 6))
            images = (PlacedImage(make_image(draw(st.integers(1, 3))), offset),)
        sequences.append(make_sequence(n + 1, prompt, new, images))
    batch = draw(st.integers(1, 5))
    limits = {
        "max_batch_size": batch,
        "max_step_tokens": draw(st.integers(batch, 40)),
        "max_waiting_tokens": draw(st.integers(0, 6)),
        "waiting_served_ratio": draw(st.sampled_from([0, 1, 100])),
        "max_step_tiles": draw(st.sampled_from([1, 4, 8])),
    }
    cancelled = draw(st.lists(st.integers(1, 10), max_size=3))
    return limits, sequences, cancelled, num_blocks


class CheckingShard:
    """Follows the plans as a shard would and objects to everything it could not compute."""

    def __init__(self) -> None:
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        self.features: set[bytes] = set()

    def run(self, plan: StepPlan) -> None:
        for sequence_id in plan.released_sequence_ids:
            del self.computed[sequence_id], self.blocks[sequence_id]
        for content_hash in plan.released_images:
            self.features.remove(content_hash)
        for image in plan.images:
            assert image.content_hash not in self.features
            self.features.add(image.content_hash)
        for row in plan.decodes:
            sequence = row.sequence
            self._compute(sequence, row.context_len - 1, row.context_len, row.new_block_ids)
            assert row.token_id == sequence.token_ids[row.context_len - 1]
        for chunk in plan.chunks:
            if chunk.is_start:
                assert chunk.sequence.sequence_id not in self.computed
                self.computed[chunk.sequence.sequence_id] = 0
                self.blocks[chunk.sequence.sequence_id] = []
            self._compute(chunk.sequence, chunk.first, chunk.last, chunk.new_block_ids)
            for placed in chunk.sequence.images_between(chunk.first, chunk.last):
                assert placed.image.content_hash in self.features
        owned = [block for blocks in self.blocks.values() for block in blocks]
        assert len(owned) == len(set(owned)), "two sequences share a block"

    def _compute(self, sequence: Sequence, first: int, last: int, blocks: tuple[int, ...]) -> None:
        assert self.computed[sequence.sequence_id] == first < last
        self.computed[sequence.sequence_id] = last
        self.blocks[sequence.sequence_id] += blocks
        assert len(self.blocks[sequence.sequence_id]) * BLOCK_SIZE >= last


@settings(max_examples=300, deadline=None)
@given(loads())
def test_every_load_is_served_within_the_limits(
    load: tuple[dict[str, int], list[Sequence], list[int], int],
) -> None:
    limits, sequences, cancelled, num_blocks = load
    scheduler = make_scheduler(num_blocks, **limits)
    shard = CheckingShard()
    for sequence in sequences:
        scheduler.add(sequence)
    for step in range(4000):
        plan = scheduler.next_step()
        if plan.is_empty:
            break
        assert plan.num_tokens <= limits["max_step_tokens"]
        assert len(scheduler.running) <= limits["max_batch_size"]
        shard.run(plan)
        if step < len(cancelled):
            for sequence in sequences:
                if sequence.sequence_id == cancelled[step]:
                    scheduler.finish(sequence)
        still = {id(s) for s in scheduler.running}
        plan.decodes = [row for row in plan.decodes if id(row.sequence) in still]
        plan.chunks = [chunk for chunk in plan.chunks if id(chunk.sequence) in still]
        sample_all(scheduler, plan)
    assert not scheduler.running and not scheduler.waiting
    assert scheduler.pool.num_free == num_blocks
    assert shard.computed == {} and shard.features == set()
    for sequence in sequences:
        if sequence.sequence_id not in cancelled:
            assert sequence.num_generated == sequence.request.stopping.max_new_tokens
