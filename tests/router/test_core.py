"""The loop between requests and steps, over shards that answer from a list."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tessera.proto import shard_pb2
from tessera.router.blocks import BlockPool
from tessera.router.core import Core
from tessera.router.errors import GenerationError, NotReadyError, OverloadedError
from tessera.router.generation import ServingLimits
from tessera.router.in_flight import RequestStream
from tessera.router.metrics import Metrics
from tessera.router.request import FinishReason, Request, SamplingParams, StoppingParams, TokenEvent
from tessera.router.scheduler import SchedulerLimits, StepPlan
from tessera.router.shards import ShardsLost
from tessera.router.tokenizer import Tokenizer
from tests.router.scrape import metric
from tests.step_columns import add_token

T = TypeVar("T")
EOS = 2
NUM_BLOCKS = 40
PROMPT = 400  # first id of every prompt; ids below 259 are bytes


class ScriptedShards:
    """Samples 300, 301, 302, ... for every sequence; what is in `faults` happens instead."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.generated: dict[int, int] = {}
        self.eos_after: dict[int, int] = {}
        self.fails: set[int] = set()
        self.lost_at: int | None = None
        self.gate: asyncio.Event | None = None  # steps wait for it
        self.delay_s = 0.0  # of every step

    async def send(self, plan: StepPlan) -> int:
        self.plans.append(plan)
        return len(self.plans) - 1

    async def receive(self, step_id: int) -> shard_pb2.StepReply:
        plan = self.plans[step_id]
        await (self.gate.wait() if self.gate else asyncio.sleep(self.delay_s))
        if self.lost_at is not None and len(self.plans) > self.lost_at:
            raise ShardsLost("shard 1 is gone")
        reply = shard_pb2.StepReply()
        sampling = [row.sequence for row in plan.decodes]
        sampling += [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        for sequence in sampling:
            number = sequence.sequence_id
            if number in self.fails:
                reply.failures.add(sequence_id=number, message="the model's output is not finite")
                continue
            count = self.generated[number] = self.generated.get(number, 0) + 1
            token_id = EOS if count == self.eos_after.get(number) else 299 + count
            add_token(reply, sequence_id=number, token_id=token_id, logprob=-0.5)
        for chunk in plan.chunks:
            if chunk.sequence.request.sampling.prompt_logprobs:
                scores = [-float(p) for p in range(max(1, chunk.first), chunk.last)]
                reply.prompt_logprobs.add(
                    sequence_id=chunk.sequence.sequence_id,
                    first_position=max(1, chunk.first),
                    logprobs=scores,
                )
        return reply


def request(
    prompt: int = 5, new: int = 4, stop: tuple[str, ...] = (), **sampling: object
) -> Request:
    return Request(
        tuple(range(PROMPT, PROMPT + prompt)),
        (),
        SamplingParams(**sampling),  # type: ignore[arg-type]
        StoppingParams(new, stop),
    )


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint("llama"))


def with_core(
    tokenizer: Tokenizer,
    shards: ScriptedShards,
    use: Callable[[Core], Awaitable[T]],
    num_blocks: int = NUM_BLOCKS,
    metrics: Metrics | None = None,
    **options: Any,
) -> T:
    async def go() -> T:
        core = Core(
            shards,  # type: ignore[arg-type]
            tokenizer,
            frozenset({EOS}),
            metrics or Metrics(),
            **options,
        )
        assert not core.ready
        with pytest.raises(NotReadyError):
            core.submit(request())
        open_core(core, num_blocks)
        running = asyncio.create_task(run(core))
        try:
            return await asyncio.wait_for(use(core), 20)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(go())


async def run(core: Core) -> None:
    try:
        await core.run()
    except ShardsLost as error:
        core.lose(error)


async def read(stream: RequestStream) -> list[TokenEvent]:
    events = await stream.next_events()
    while events[-1].completion is None:
        events += await stream.next_events()
    return events


def test_what_it_counts(tokenizer: Tokenizer) -> None:
    metrics = Metrics()
    shards = ScriptedShards()
    shards.eos_after[3] = 2
    done = metrics.requests.finished

    async def use(core: Core) -> None:
        lengths = [request(prompt=5, new=4), request(prompt=70, new=1), request(prompt=6, new=9)]
        streams = [core.submit(one) for one in lengths]
        for events in await asyncio.gather(*map(read, streams)):
            assert events[-1].completion is not None
            done(events[-1].completion)
        again = core.submit(request(prompt=70, new=1))
        await read(again)
        assert again.cached_tokens == 68
        while len(shards.plans) != metric(metrics, "tessera_step_duration_seconds_count"):
            await asyncio.sleep(0.01)  # the last step only tells the shards to forget

    with_core(tokenizer, shards, use, metrics=metrics)
    assert {
        name: metric(metrics, name)
        for name in (
            "tgi_request_success",
            "tgi_request_generated_tokens_sum",
            "tgi_request_skipped_tokens_sum",
            "tessera_generation_tokens_total",
            "tessera_prompt_tokens_total",
            "tessera_prompt_tokens_cached_total",
            "tessera_prefix_cache_hits_total",
            "tessera_time_to_first_token_seconds_count",
            "tessera_inter_token_latency_seconds_count",
            "tessera_request_queue_time_seconds_count",
            "tessera_request_prefill_time_seconds_count",
            "tessera_step_tokens_sum",
            "tessera_num_requests_running",
        )
    } == {
        "tgi_request_success": 3,
        "tgi_request_generated_tokens_sum": 4 + 1 + 2,
        "tgi_request_skipped_tokens_sum": 0,
        "tessera_generation_tokens_total": 4 + 1 + 2 + 1,
        "tessera_prompt_tokens_total": 5 + 70 + 6 + 70,
        "tessera_prompt_tokens_cached_total": 4 + 4 + 68,  # all begin alike
        "tessera_prefix_cache_hits_total": 4 + 4 + 68,
        "tessera_time_to_first_token_seconds_count": 4,
        "tessera_inter_token_latency_seconds_count": 3 + 0 + 1,
        "tessera_request_queue_time_seconds_count": 4,
        "tessera_request_prefill_time_seconds_count": 3,
        "tessera_step_tokens_sum": sum(plan.num_tokens for plan in shards.plans),
        "tessera_num_requests_running": 0,
    }
    working = [plan for plan in shards.plans if plan.num_tokens]
    assert len(working) < len(shards.plans)
    for name in ("count", "success", "duration_count"):
        assert metric(metrics, f"tgi_batch_inference_{name}") == len(working)
    assert metric(metrics, 'tessera_step_duration_seconds_count{kind="release"}') == (
        len(shards.plans) - len(working)
    )
    assert metric(metrics, "tgi_batch_next_size_sum") == 4
    assert metric(metrics, "tgi_batch_inference_failure") == 0


def test_a_step_sent_ahead_is_not_charged_with_the_one_before(tokenizer: Tokenizer) -> None:
    metrics = Metrics()

    async def use(core: Core) -> float:
        began = time.perf_counter()
        await read(core.submit(request(new=8)))
        return time.perf_counter() - began

    shards = ScriptedShards()
    shards.delay_s = 0.01
    elapsed = with_core(tokenizer, shards, use, metrics=metrics, lookahead=1)
    assert 0.08 <= metric(metrics, "tgi_batch_inference_duration_sum") <= elapsed


def test_a_lost_step_is_counted(tokenizer: Tokenizer) -> None:
    metrics, shards = Metrics(), ScriptedShards()
    shards.lost_at = 0

    async def use(core: Core) -> None:
        with pytest.raises(GenerationError):
            await read(core.submit(request()))

    with_core(tokenizer, shards, use, metrics=metrics)
    assert metric(metrics, 'tgi_batch_inference_failure{method="prefill"}') == 1
    assert metric(metrics, 'tgi_batch_inference_count{method="prefill"}') == 1
    assert metric(metrics, "tgi_batch_inference_success") == 0


def test_tokens_come_in_order_and_the_last_event_sums_up(tokenizer: Tokenizer) -> None:
    async def use(core: Core) -> list[TokenEvent]:
        return await read(core.submit(request(new=3)))

    events = with_core(tokenizer, ScriptedShards(), use)
    assert [event.token.id for event in events] == [300, 301, 302]
    completion = events[-1].completion
    assert completion is not None and completion.reason is FinishReason.LENGTH
    assert completion.generated_tokens == 3 and completion.seed is None
    assert "".join(event.text for event in events) == completion.text
    prompt = list(range(PROMPT, PROMPT + 5))
    whole = tokenizer.decode([*prompt, 300, 301, 302])
    assert completion.text and completion.text == whole.removeprefix(tokenizer.decode(prompt))
    timings = completion.timings
    assert 0 <= timings.queue <= timings.first_token <= timings.total


def test_end_of_text_ends_a_request_even_at_its_last_token(tokenizer: Tokenizer) -> None:
    shards = ScriptedShards()
    shards.eos_after = {1: 3}

    async def use(core: Core) -> list[TokenEvent]:
        return await read(core.submit(request(new=3)))

    events = with_core(tokenizer, shards, use)
    assert events[-1].token.special and events[-1].text == ""
    assert events[-1].completion is not None
    assert events[-1].completion.reason is FinishReason.EOS


def test_a_stop_string_ends_a_request(tokenizer: Tokenizer) -> None:
    async def use(core: Core) -> tuple[str, list[TokenEvent]]:
        stop = (await read(core.submit(request(new=20))))[2].text.strip()
        return stop, await read(core.submit(request(new=20, stop=(stop,))))

    stop, events = with_core(tokenizer, ScriptedShards(), use)
    completion = events[-1].completion
    assert stop and completion is not None and completion.reason is FinishReason.STOP
    assert completion.text.endswith(stop) and len(events) <= 3


def test_a_client_that_leaves_frees_its_blocks_within_two_steps(tokenizer: Tokenizer) -> None:
    shards = ScriptedShards()

    async def use(core: Core) -> int:
        shards.gate = asyncio.Event()
        leaving = core.submit(request(prompt=30, new=90))
        staying = asyncio.create_task(read(core.submit(request(new=30))))
        await asyncio.sleep(0.01)  # its first step is under way
        leaving.close()
        before = len(shards.plans)
        shards.gate.set()
        assert len(await staying) == 30
        return before

    before = with_core(tokenizer, shards, use)
    assert [plan.released_sequence_ids for plan in shards.plans[before:]].index([1]) < 2
    later = [s.sequence_id for plan in shards.plans[before:] for s in plan.sequences]
    assert 1 not in later


def test_all_blocks_come_back(tokenizer: Tokenizer) -> None:
    async def use(core: Core) -> tuple[float, list[int]]:
        streams = [core.submit(request(prompt=3 + n, new=2 + n)) for n in range(20)]
        events = await asyncio.gather(*(read(stream) for stream in streams[:-2]))
        for stream in streams:
            stream.close()
        scheduler = core._scheduler
        assert scheduler is not None
        return scheduler.pool.num_free, [len(one) for one in events]

    free, counts = with_core(tokenizer, ScriptedShards(), use, num_blocks=16)
    assert free == 16
    assert counts == [2 + n for n in range(18)]


def test_a_failure_stays_with_its_owner(tokenizer: Tokenizer) -> None:
    shards = ScriptedShards()
    shards.fails = {1}

    async def use(core: Core) -> list[TokenEvent]:
        bad, good = core.submit(request()), core.submit(request())
        with pytest.raises(GenerationError, match="not finite"):
            await read(bad)
        return await read(good)

    assert len(with_core(tokenizer, shards, use)) == 4


@pytest.mark.parametrize("fails_again", [False, True])
def test_whoever_shared_blocks_with_a_failed_request_is_computed_again_on_its_own(
    tokenizer: Tokenizer, fails_again: bool
) -> None:
    shards = ScriptedShards()
    shards.fails = {1, 2, 3} if fails_again else {1, 2}

    async def use(core: Core) -> int:
        bad, good = core.submit(request()), core.submit(request())
        with pytest.raises(GenerationError):
            await read(bad)
        if fails_again:
            with pytest.raises(GenerationError):
                await read(good)
        else:
            assert [event.token.id for event in await read(good)] == [300, 301, 302, 303]
        good.close()
        scheduler = core._scheduler
        assert scheduler is not None
        return scheduler.pool.num_free

    assert with_core(tokenizer, shards, use) == NUM_BLOCKS
    chunks = [chunk for plan in shards.plans for chunk in plan.chunks]
    assert [(c.sequence.sequence_id, c.first) for c in chunks] == [(1, 0), (2, 4), (3, 0)]


def test_lost_shards_end_every_request_with_an_error_and_close_the_door(
    tokenizer: Tokenizer,
) -> None:
    shards = ScriptedShards()
    shards.lost_at = 2

    async def use(core: Core) -> None:
        streams = [core.submit(request(new=50)) for _ in range(3)]
        for stream in streams:
            with pytest.raises(GenerationError, match="shard was lost"):
                await read(stream)
        assert not core.ready
        with pytest.raises(NotReadyError, match="lost a shard"):
            core.submit(request())

    with_core(tokenizer, shards, use)


def suspended_core(
    tokenizer: Tokenizer, use: Callable[[Core, ScriptedShards], Awaitable[None]]
) -> None:
    """`use` a core whose shards were lost at the third step, with one request under way."""

    async def go() -> None:
        shards = ScriptedShards()
        shards.lost_at = 2
        core = Core(shards, tokenizer, frozenset({EOS}), Metrics())  # type: ignore[arg-type]
        open_core(core)
        core.submit(request(new=50))
        with pytest.raises(ShardsLost) as lost:
            await asyncio.wait_for(core.run(), 10)
        core.suspend(lost.value)
        shards.lost_at = None
        await use(core, shards)

    asyncio.run(go())


def open_core(core: Core, num_blocks: int = NUM_BLOCKS) -> None:
    limits = ServingLimits(100, 128, 32, 640, 8)
    core.open(limits, SchedulerLimits(32, 8, 3, 0, 8), BlockPool(num_blocks, 4))


def test_requests_that_come_while_shards_are_started_wait_for_them(tokenizer: Tokenizer) -> None:
    async def use(core: Core, shards: ScriptedShards) -> None:
        assert not core.ready  # who has the choice should ask another server
        stream = core.submit(request(new=3))
        open_core(core)
        assert core.ready
        running = asyncio.create_task(core.run())
        assert len(await asyncio.wait_for(read(stream), 10)) == 3
        running.cancel()

    suspended_core(tokenizer, use)


def test_whoever_waits_too_long_for_new_shards_is_told(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.router.core.PATIENCE_S", 0.05)

    async def use(core: Core, shards: ScriptedShards) -> None:
        stream = core.submit(request(new=3))
        with pytest.raises(GenerationError, match="a shard was lost"):
            await asyncio.wait_for(read(stream), 10)
        with pytest.raises(NotReadyError, match="lost a shard"):
            core.submit(request())
        open_core(core)
        assert core.ready
        core.submit(request())

    suspended_core(tokenizer, use)


def test_whoever_does_not_fit_into_the_new_cache_is_told(tokenizer: Tokenizer) -> None:
    async def use(core: Core, shards: ScriptedShards) -> None:
        small, large = core.submit(request(new=3)), core.submit(request(prompt=30, new=30))
        open_core(core, num_blocks=10)
        running = asyncio.create_task(core.run())
        with pytest.raises(GenerationError, match="does not fit"):
            await asyncio.wait_for(read(large), 10)
        assert len(await asyncio.wait_for(read(small), 10)) == 3
        running.cancel()

    suspended_core(tokenizer, use)


def test_draining_does_not_wait_for_new_shards(tokenizer: Tokenizer) -> None:
    async def use(core: Core, shards: ScriptedShards) -> None:
        stream = core.submit(request(new=3))
        core.drain()
        with pytest.raises(GenerationError, match="a shard was lost"):
            await asyncio.wait_for(read(stream), 10)

    suspended_core(tokenizer, use)


def test_draining_refuses_newcomers_and_finishes_the_rest(tokenizer: Tokenizer) -> None:
    async def use(core: Core) -> list[TokenEvent]:
        stream = core.submit(request(new=9))
        core.drain()
        assert not core.ready
        with pytest.raises(NotReadyError, match="shutting down"):
            core.submit(request())
        return await read(stream)

    assert len(with_core(tokenizer, ScriptedShards(), use)) == 9


def test_what_is_still_under_way_at_the_end_of_the_grace_is_told(tokenizer: Tokenizer) -> None:
    async def use(core: Core) -> float:
        stream = core.submit(request(new=9000))
        await stream.next_events()
        core.drain()
        core.end_all("the server is shutting down")
        with pytest.raises(GenerationError, match="shutting down"):
            await read(stream)
        scheduler = core._scheduler
        assert scheduler is not None
        return scheduler.pool.num_free

    assert with_core(tokenizer, ScriptedShards(), use) == NUM_BLOCKS


def test_prompt_logprobs_are_whole_across_chunks(tokenizer: Tokenizer) -> None:
    async def use(core: Core) -> RequestStream:
        stream = core.submit(request(prompt=70, prompt_logprobs=True))
        await read(stream)
        return stream

    stream = with_core(tokenizer, ScriptedShards(), use)
    logprobs = [token.logprob for token in stream.prompt_logprobs]
    assert logprobs[0] != logprobs[0]  # nan
    assert logprobs[1:] == [-float(p) for p in range(1, 70)]
    assert [token.id for token in stream.prompt_logprobs] == list(range(PROMPT, PROMPT + 70))


class Clock:
    """Time that stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def overdue(stream: RequestStream) -> OverloadedError:
    with pytest.raises(OverloadedError) as refused:
        await asyncio.wait_for(read(stream), 10)
    return refused.value


def test_a_request_that_waits_too_long_is_told_to_come_again(tokenizer: Tokenizer) -> None:
    clock, shards = Clock(), ScriptedShards()

    async def use(core: Core) -> tuple[OverloadedError, int]:
        shards.gate = asyncio.Event()
        running = [core.submit(request(new=20)) for _ in range(8)]  # the batch is full
        late = core.submit(request())
        clock.now_s += 2.0
        later = core.submit(request(new=2))
        clock.now_s += 0.5  # 2.5 seconds after the first nine, 0.5 after the last
        shards.gate.set()
        error = await overdue(late)
        for stream in running:
            assert len(await read(stream)) == 20  # those that were let in go on
        assert len(await read(later)) == 2
        late.close()  # harmless
        return error, core.limits.max_batch_size

    error, _ = with_core(tokenizer, shards, use, max_queue_time_s=2.5, clock=clock)
    assert error.status == 429
    assert "not let in within 2.5 seconds (MAX_QUEUE_TIME)" in str(error)
    assert 9 not in {s.sequence_id for plan in shards.plans for s in plan.sequences}


def test_nobody_is_overdue_a_moment_before_the_time_is_up(tokenizer: Tokenizer) -> None:
    clock, shards = Clock(), ScriptedShards()

    async def use(core: Core) -> None:
        shards.gate = asyncio.Event()
        streams = [core.submit(request(new=3)) for _ in range(10)]
        clock.now_s += 2.4
        shards.gate.set()
        for stream in streams:
            assert len(await read(stream)) == 3

    with_core(tokenizer, shards, use, max_queue_time_s=2.5, clock=clock)


def test_the_queue_is_watched_while_no_step_ends(tokenizer: Tokenizer) -> None:
    clock, shards = Clock(), ScriptedShards()

    async def use(core: Core) -> None:
        shards.gate = asyncio.Event()  # stays shut: the shards are busy with the first steps
        running = [core.submit(request(new=20)) for _ in range(8)]
        while len(shards.plans) < 2:
            await asyncio.sleep(0)
        waiting = [core.submit(request()) for _ in range(3)]
        clock.now_s += 1.0
        for stream in waiting:
            await overdue(stream)
        shards.gate.set()
        for stream in running:
            assert len(await read(stream)) == 20

    with_core(tokenizer, shards, use, max_queue_time_s=0.02, clock=clock)


def test_a_preempted_request_is_never_overdue(tokenizer: Tokenizer) -> None:
    clock, shards = Clock(), ScriptedShards()

    async def use(core: Core) -> int:
        streams = [core.submit(request(prompt=12, new=30)) for _ in range(3)]
        reading = [asyncio.create_task(read(stream)) for stream in streams]
        while not all(task.done() for task in reading):
            await asyncio.sleep(0)
            if len(shards.plans) > 3:  # all have begun; from here on every wait is too long
                clock.now_s += 10.0
        assert [len(task.result()) for task in reading] == [30, 30, 30]
        scheduler = core._scheduler
        assert scheduler is not None
        return scheduler.counts.preemptions

    preempted = with_core(tokenizer, shards, use, num_blocks=16, max_queue_time_s=1.0, clock=clock)
    assert preempted > 0


def test_without_a_limit_a_request_waits_for_ever(tokenizer: Tokenizer) -> None:
    clock, shards = Clock(), ScriptedShards()

    async def use(core: Core) -> None:
        shards.gate = asyncio.Event()
        streams = [core.submit(request(new=3)) for _ in range(10)]
        clock.now_s += 1e9
        shards.gate.set()
        for stream in streams:
            assert len(await read(stream)) == 3

    with_core(tokenizer, shards, use, clock=clock)
