"""The scheduler's rules one by one."""

from collections.abc import Iterator
from typing import Any

import pytest

from tessera.router.blocks import BlockPool
from tessera.router.request import (
    PlacedImage,
    PreparedImage,
    Request,
    SamplingParams,
    StoppingParams,
)
from tessera.router.scheduler import MAX_OVERTAKES, Scheduler, SchedulerLimits, StepPlan
from tessera.router.sequence import Sequence
from tessera.router.waiting import WaitingQueue

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 64, **changes: float) -> Scheduler:
    values: dict[str, float] = {
        "max_step_tokens": 32,
        "max_batch_size": 8,
        "max_waiting_tokens": 3,
        "waiting_served_ratio": 100.0,
        "max_step_tiles": 8,
        "prefix_caching": False,
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
    **changes: Any,
) -> Sequence:
    ids = tuple(range(prompt_tokens))
    sampling = changes.pop("sampling", SamplingParams())
    request = Request(ids, images, sampling, StoppingParams(max_new_tokens), **changes)
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
    assert scheduler.counts.preemptions >= 1
    rebuilt = [chunk for chunk in chunks if chunk[0] == 2]
    assert len(rebuilt) >= 2 and rebuilt[1][1] == 0 and rebuilt[1][2] > 4
    assert released.count(2) == len(rebuilt)  # once for each start
    assert (old.num_generated, young.num_generated) == (12, 12)
    assert scheduler.pool.num_free == 5


def test_cancelled_sequence_gives_its_blocks_back_at_once_and_is_released_in_the_next_step() -> (
    None
):
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
    scheduler = make_scheduler(waiting_served_ratio=0, max_step_tokens=12, vision_cache_tokens=12)
    for n in (1, 2):
        placed = PlacedImage(make_image(n), offset=0)
        scheduler.add(make_sequence(n, prompt_tokens=10, images=(placed,)))
    plan = scheduler.next_step()
    assert [image.content_hash[0] for image in plan.images] == [1, 2]


def test_tile_budget_postpones_a_picture_but_not_the_text_before_it() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0, max_step_tiles=4, vision_cache_tokens=12)
    for n in (1, 2):
        placed = PlacedImage(make_image(n), offset=3)
        scheduler.add(make_sequence(n, prompt_tokens=10, images=(placed,)))
    plan = scheduler.next_step()
    assert [(c.sequence.sequence_id, c.first, c.last) for c in plan.chunks] == [
        (1, 0, 10),
        (2, 0, 3),
    ]
    sample_all(scheduler, plan)
    plan = scheduler.next_step()
    assert [image.content_hash[0] for image in plan.images] == [2]
    assert [(c.sequence.sequence_id, c.first, c.last) for c in plan.chunks] == [(2, 3, 10)]


def test_features_of_those_that_wait_are_bounded_but_never_block() -> None:
    scheduler = make_scheduler(waiting_served_ratio=0, vision_cache_tokens=6)
    for n in range(5):
        placed = PlacedImage(make_image(n), offset=1)
        scheduler.add(make_sequence(n, prompt_tokens=10, max_new_tokens=1, images=(placed,)))
    seen = []
    for plan in run(scheduler, 12):
        assert scheduler.images.encoded_tokens <= 2 * 6
        seen += [image.content_hash[0] for image in plan.images]
    assert seen == [0, 1, 2, 3, 4] and not scheduler.running and not scheduler.waiting


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


def test_what_it_counts() -> None:
    scheduler = cached_scheduler(vision_cache_tokens=12)
    for number, name in enumerate((1, 1, 2)):
        placed = PlacedImage(make_image(name), offset=0)
        finish_one(scheduler, make_sequence(number, 10, 1, images=(placed,)))
    counts = scheduler.counts
    assert (counts.prefix_query_tokens, counts.prefix_hit_tokens) == (30, 8)
    assert (counts.vision_misses, counts.vision_hits) == (2, 1)
    assert counts.preemptions == 0


def test_a_block_cannot_come_back_twice() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(ValueError, match="twice"):
        pool.free(blocks)


def cached_scheduler(**changes: float) -> Scheduler:
    return make_scheduler(prefix_caching=True, waiting_served_ratio=0, **changes)


def first_chunk(scheduler: Scheduler) -> tuple[int, int]:
    (chunk,) = scheduler.next_step().chunks
    return chunk.first, chunk.last


def finish_one(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.add(sequence)
    while sequence in scheduler.running or sequence in list(scheduler.waiting):
        sample_all(scheduler, scheduler.next_step())


def test_a_prefix_is_found_again_after_its_sequence_ended_generated_tokens_included() -> None:
    scheduler = cached_scheduler()
    first = make_sequence(1, prompt_tokens=6, max_new_tokens=7)
    finish_one(scheduler, first)  # computed 12 of 13 tokens: three full blocks
    second = make_sequence(2, prompt_tokens=6, max_new_tokens=1)
    second.request = Request((*first.token_ids, 1, 2), (), SamplingParams(), StoppingParams(1))
    second.token_ids = list(second.request.prompt_ids)
    scheduler.add(second)
    assert first_chunk(scheduler) == (12, 15)
    assert second.num_cached == 12


def test_a_prefix_is_shared_by_sequences_that_run_at_the_same_time() -> None:
    scheduler = cached_scheduler(num_blocks=12)
    scheduler.add(make_sequence(1, prompt_tokens=30))
    scheduler.next_step()
    scheduler.add(make_sequence(2, prompt_tokens=30))
    assert [(c.first, c.last) for c in scheduler.next_step().chunks] == [(28, 30)]
    assert scheduler.pool.num_free == 12 - 8 - 1


def test_one_token_is_always_computed() -> None:
    scheduler = cached_scheduler()
    finish_one(scheduler, make_sequence(1, prompt_tokens=8, max_new_tokens=5))
    scheduler.add(make_sequence(2, prompt_tokens=8))
    assert first_chunk(scheduler) == (4, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_prefix_cache": False},
        {"cache_salt": "another tenant"},
        {"sampling": SamplingParams(prompt_logprobs=True)},
    ],
)
def test_what_keeps_a_request_from_using_the_cache(changes: dict[str, Any]) -> None:
    scheduler = cached_scheduler()
    finish_one(scheduler, make_sequence(1, prompt_tokens=12))
    scheduler.add(make_sequence(2, prompt_tokens=12, **changes))
    assert first_chunk(scheduler) == (0, 12)


def test_the_cache_can_be_switched_off() -> None:
    scheduler = make_scheduler()
    finish_one(scheduler, make_sequence(1, prompt_tokens=12))
    scheduler.add(make_sequence(2, prompt_tokens=12))
    assert first_chunk(scheduler) == (0, 12)
    assert scheduler.pool.num_kept == 0


@pytest.mark.parametrize(("name", "offset", "expected"), [(5, 3, 12), (6, 3, 0), (5, 2, 0)])
def test_pictures_are_part_of_a_blocks_address(name: int, offset: int, expected: int) -> None:
    """All placeholders have the same id, so only the picture and its place tell them apart."""
    scheduler = cached_scheduler()
    placed = PlacedImage(make_image(5), offset=3)
    finish_one(scheduler, make_sequence(1, prompt_tokens=14, images=(placed,)))
    again = PlacedImage(make_image(name), offset=offset)
    scheduler.add(make_sequence(2, prompt_tokens=14, images=(again,)))
    plan = scheduler.next_step()
    assert plan.chunks[0].first == expected
    assert bool(plan.images) == (expected == 0)  # a picture that is all in the cache is not encoded


def test_features_stay_for_the_next_request_as_long_as_they_fit() -> None:
    scheduler = make_scheduler(vision_cache_tokens=12)
    released: list[bytes] = []
    for number, name in enumerate((1, 2, 1, 3, 1)):
        placed = PlacedImage(make_image(name), offset=0)
        scheduler.add(make_sequence(number, 10, 1, images=(placed,)))
        plan = scheduler.next_step()
        assert bool(plan.images) == (number in (0, 1, 3))
        sample_all(scheduler, plan)
        released += plan.released_images
    assert [content_hash[0] for content_hash in released] == [2]


def test_tainted_blocks_are_never_found() -> None:
    scheduler = cached_scheduler()
    sequence = make_sequence(1, prompt_tokens=12)
    scheduler.add(sequence)
    scheduler.next_step()
    scheduler.finish(sequence, is_tainted=True)
    scheduler.add(make_sequence(2, prompt_tokens=12))
    assert first_chunk(scheduler) == (0, 12)


def test_kept_content_gives_way_to_new_content_oldest_first() -> None:
    scheduler = cached_scheduler(num_blocks=6)
    finish_one(scheduler, make_sequence(1, prompt_tokens=8, max_new_tokens=1))
    finish_one(scheduler, make_sequence(2, prompt_tokens=8, max_new_tokens=1, cache_salt="b"))
    assert scheduler.pool.num_kept == 4
    finish_one(scheduler, make_sequence(3, prompt_tokens=14, max_new_tokens=1, cache_salt="c"))
    for number, (salt, first) in enumerate((("b", 4), ("", 0)), start=4):
        scheduler.add(make_sequence(number, prompt_tokens=8, max_new_tokens=1, cache_salt=salt))
        plan = scheduler.next_step()
        assert plan.chunks[0].first == first
        sample_all(scheduler, plan)


def test_lookahead_decodes_the_token_that_is_still_on_its_way() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1, max_new_tokens=3)
    scheduler.add(sequence)
    scheduler.next_step()
    (ahead,) = scheduler.next_step().decodes
    assert (ahead.token_id, ahead.context_len) == (None, 5)
    (further,) = scheduler.next_step().decodes
    assert (further.token_id, further.context_len) == (None, 6)
    assert scheduler.next_step().is_empty  # all three tokens are planned


def test_a_sequence_that_does_not_fit_is_overtaken_a_bounded_number_of_times() -> None:
    scheduler = make_scheduler(num_blocks=10, waiting_served_ratio=0, max_step_tokens=40)
    scheduler.add(make_sequence(0, prompt_tokens=8, max_new_tokens=20))
    sample_all(scheduler, scheduler.next_step())
    big = make_sequence(1, prompt_tokens=36, max_new_tokens=1)
    scheduler.add(big)
    overtakers = 0
    for number in range(2, 60):
        scheduler.add(make_sequence(number, prompt_tokens=3, max_new_tokens=1))
        plan = scheduler.next_step()
        overtakers += sum(s not in (0, 1) for s in started(plan))
        sample_all(scheduler, plan)
        if big.num_generated:
            break
    assert big.num_generated == 1
    assert 0 < overtakers <= MAX_OVERTAKES + 1


def test_priority_goes_first_and_keys_take_turns() -> None:
    scheduler = make_scheduler(max_batch_size=1, waiting_served_ratio=0)
    for number, key in enumerate("aaaab"):
        scheduler.add(make_sequence(number, max_new_tokens=1, fairness_key=key))
    scheduler.add(make_sequence(9, max_new_tokens=1, fairness_key="a", priority=1))
    order = [number for plan in run(scheduler, 8) for number in started(plan)]
    assert order == [9, 0, 4, 1, 2, 3]


def test_a_client_that_leaves_the_queue_does_not_move_it_on() -> None:
    scheduler = make_scheduler(max_batch_size=1, waiting_served_ratio=0)
    greedy = [make_sequence(n, max_new_tokens=1, fairness_key="a") for n in range(5)]
    for sequence in greedy:
        scheduler.add(sequence)
    scheduler.finish(greedy[4])
    scheduler.add(make_sequence(9, max_new_tokens=1, fairness_key="b"))
    order = [number for plan in run(scheduler, 8) for number in started(plan)]
    assert order == [0, 9, 1, 2, 3]


def test_the_keys_that_owe_least_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.router.waiting.MAX_IDLE_KEYS", 4)
    queue = WaitingQueue()
    queue.append(make_sequence(0, fairness_key="waits", priority=-1))
    for number in range(1, 100):
        sequence = make_sequence(number, fairness_key=str(number))
        queue.append(sequence)
        queue.let_in(sequence)
        assert "waits" in queue._next_start
        assert len(queue._next_start) <= 1 + 4


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    scheduler = make_scheduler(max_step_tokens=8, waiting_served_ratio=0)
    scheduler.add(make_sequence(0, prompt_tokens=90))
    list(run(scheduler, 2))
    for number in range(1, 9):
        scheduler.add(make_sequence(number, prompt_tokens=5, max_new_tokens=1))
    before = scheduler.running[0].num_computed
    plans = list(run(scheduler, 7))
    assert [number for plan in plans for number in started(plan)][:3] == [1, 2, 3]
    # The long one is sure of a quarter of each step.
    assert all(plan.num_tokens == 8 for plan in plans)
    assert scheduler.running[0].num_computed - before >= 7 * 2


def test_a_preempted_sequence_waits_for_the_token_that_is_on_its_way() -> None:
    scheduler = make_scheduler(num_blocks=3, waiting_served_ratio=0)
    old, young = make_sequence(1, 4, 8), make_sequence(2, 3, 8)
    scheduler.add(old)
    scheduler.add(young)
    scheduler.next_step()  # both start
    scheduler.append_token(old, 7)
    scheduler.append_token(young, 7)
    scheduler.next_step()  # both decode; the old one takes the last block
    scheduler.append_token(old, 7)
    assert (
        scheduler.next_step().decodes[0].sequence is old
    )  # the young one needs a block: preempted
    assert (scheduler.counts.preemptions, young.num_pending) == (1, 1)
    scheduler.finish(old)  # now there is room
    assert scheduler.next_step().chunks == []
    scheduler.append_token(young, 8)
    (chunk,) = scheduler.next_step().chunks
    assert (chunk.first, chunk.last) == (0, 5)
