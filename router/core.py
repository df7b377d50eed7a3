"""The loop between requests and steps: plan, send, take the tokens, tell the clients, again."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import count

from tessera.proto import shard_pb2
from tessera.proto.columns import SampledToken, sampled_tokens
from tessera.router.blocks import BlockPool
from tessera.router.errors import GenerationError, NotReadyError, OverloadedError, RouterError
from tessera.router.generation import ServingLimits
from tessera.router.guidance_masks import GuidanceMasks
from tessera.router.in_flight import InFlight, RequestStream
from tessera.router.metrics import Metrics
from tessera.router.metrics.steps import StepKind, kind_of
from tessera.router.progress import Progress
from tessera.router.queue_time import QueueTime
from tessera.router.request import Request
from tessera.router.scheduler import Scheduler, SchedulerLimits, StepPlan
from tessera.router.sequence import Sequence
from tessera.router.shards import ShardGroup, ShardsLost
from tessera.router.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_LOSSES = 1
"""A request that computes while shards are lost may be what kills them: it is tried once more."""

PATIENCE_S = 60.0
"""How long requests wait for new shards."""

SHARD_LOST = "a shard was lost; the request can be retried"


class _ShardState(Enum):
    """How the shards are. Whether the server drains is another matter."""

    LOADING = auto()  # for the first time
    SERVING = auto()
    AWAITED = auto()  # lost, and new ones are being started: requests wait for them
    LOST = auto()  # for good, or nobody waits any longer


@dataclass(frozen=True, slots=True)
class _SentStep:
    """A step whose reply is awaited."""

    step_id: int
    kind: StepKind
    num_tokens: int
    num_pictures: int
    sent_at: float
    traced: Seq[Progress]  # of the requests whose traces tell how long their steps took


class Core:
    """Implements `generation.Generator` over a warm group of shards."""

    def __init__(
        self,
        shards: ShardGroup,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        metrics: Metrics,
        lookahead: int = 1,
        max_queue_time_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            lookahead: steps sent before the tokens of the one before them are back, 0 or more.
            max_queue_time_s: how long a request may wait to be let in, above 0; None: any time.
            clock: what measures that, in seconds.
        """
        self._shards = shards
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._metrics = metrics
        self._lookahead = lookahead
        self._limits: ServingLimits | None = None
        self._scheduler: Scheduler | None = None
        self._in_flight: dict[int, InFlight] = {}
        self._answered_at = 0.0  # when the last step came back
        self._ids = count(1)
        self._wake = asyncio.Event()
        self._masks = GuidanceMasks(shards, self._on_mask_failure, self._wake.set)
        self._queue_time = QueueTime(max_queue_time_s, clock)
        self._queue_timer: asyncio.TimerHandle | None = None
        self._state = _ShardState.LOADING
        self._is_draining = False
        self._impatience: asyncio.TimerHandle | None = None

    @property
    def limits(self) -> ServingLimits:
        """What fits; raises NotReadyError before the warm-up."""
        if self._limits is None:
            raise NotReadyError("the model is still loading; try again in a while")
        return self._limits

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would be run at once."""
        return self._state is _ShardState.SERVING and not self._is_draining

    @property
    def takes_requests(self) -> bool:
        """Whether a request submitted now would be run, perhaps by shards that are awaited."""
        return self._state in (_ShardState.SERVING, _ShardState.AWAITED) and not self._is_draining

    def open(self, limits: ServingLimits, scheduling: SchedulerLimits, pool: BlockPool) -> None:
        """Take requests from now on; called after each warm-up. `scheduling` does not change."""
        self._limits = limits
        if self._scheduler is None:
            self._scheduler = Scheduler(scheduling, pool)
            self._metrics.open(limits, self._scheduler)
        else:
            self._resume(self._scheduler, pool)
        self._state = _ShardState.SERVING

    def drain(self) -> None:
        """Refuse new requests; those under way go on, where there are shards."""
        self._is_draining = True
        if self._state is _ShardState.AWAITED:
            self.end_all(SHARD_LOST)

    def submit(self, request: Request) -> RequestStream:
        """Queue one request. See `generation.Generator.submit`."""
        if self._scheduler is None or not self.takes_requests:
            raise NotReadyError(self._why_not_ready())
        sequence = Sequence(next(self._ids), request)
        stream = RequestStream(sequence, cancel=partial(self.cancel, sequence))
        self._in_flight[sequence.sequence_id] = InFlight(
            sequence,
            stream,
            self._tokenizer,
            self._eos_ids,
            self._metrics.requests,
        )
        self._scheduler.add(sequence)
        self._queue_time.add(sequence.sequence_id)
        self._set_queue_timer()
        self._wake.set()
        return stream

    def cancel(self, sequence: Sequence, *, is_tainted: bool = False) -> None:
        """Forget a request whose client left; harmless when it is over.

        Args:
            is_tainted: what it computed went wrong, so its blocks must not serve others.
        """
        self._masks.release(sequence.sequence_id)
        if self._in_flight.pop(sequence.sequence_id, None) is not None and self._scheduler:
            self._scheduler.finish(sequence, is_tainted=is_tainted)
            self._wake.set()

    async def run(self) -> None:
        """Run steps until cancelled.

        Raises:
            ShardsLost: `suspend` or `lose` is to be called next.
        """
        if self._scheduler is None:
            raise RuntimeError("Core.run before Core.open")
        try:
            await self._run_steps(self._scheduler)
        finally:
            self._masks.close()

    def lose(self, error: ShardsLost) -> None:
        """Tell every request under way that the shards are gone, and take no more of them."""
        self._state = _ShardState.LOST
        logger.error("%s", error)
        self.end_all(SHARD_LOST)

    def suspend(self, error: ShardsLost) -> None:
        """The shards are gone and new ones are awaited, with which all goes on (`open`)."""
        logger.error("%s", error)
        self._masks = GuidanceMasks(self._shards, self._on_mask_failure, self._wake.set)
        if self._scheduler is None or self._state is not _ShardState.SERVING:
            return
        self._state = _ShardState.AWAITED
        self._metrics.ranks.lost()
        for sequence in list(self._scheduler.running):
            self._suspend(self._in_flight[sequence.sequence_id])
        if self._is_draining:
            self.end_all(SHARD_LOST)
        self._impatience = asyncio.get_running_loop().call_later(PATIENCE_S, self._lose_patience)

    def _suspend(self, flight: InFlight) -> None:
        flight.sequence.num_losses += 1
        if flight.sequence.num_losses > MAX_LOSSES:
            self._fail(flight, GenerationError("shards were lost again while computing it"))
        else:
            flight.stream.progress.preempted_at.append(time.perf_counter())

    def _lose_patience(self) -> None:
        self._state = _ShardState.LOST
        self.end_all(SHARD_LOST)

    def _resume(self, scheduler: Scheduler, pool: BlockPool) -> None:
        """Compute anew what the lost shards had computed; clients notice a pause."""
        if self._impatience is not None:
            self._impatience.cancel()
        scheduler.begin_anew(pool)
        for flight in list(self._in_flight.values()):
            request = flight.sequence.request
            longest = len(request.prompt_ids) + request.stopping.max_new_tokens
            if pool.blocks_for(longest) > pool.num_blocks:
                self._fail(flight, GenerationError("it does not fit into the new shards' cache"))
        logger.info("%d requests go on with new shards", len(self._in_flight))

    def end_all(self, reason: str) -> None:
        """End every request under way with an error that says why."""
        for flight in list(self._in_flight.values()):
            self._fail(flight, GenerationError(reason))

    async def _run_steps(self, scheduler: Scheduler) -> None:
        """Keep up to `lookahead` steps planned beyond the one whose tokens are awaited."""
        under_way: deque[_SentStep] = deque()
        while True:
            while len(under_way) <= self._lookahead:
                started = time.perf_counter()
                plan = scheduler.next_step()
                self._metrics.steps.planned(plan, time.perf_counter() - started)
                self._note_preempted(plan)
                self._end_overdue()
                if plan.is_empty:
                    break
                under_way.append(await self._send(plan))
            if under_way:
                await self._receive(under_way.popleft(), scheduler)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _note_preempted(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        for sequence in plan.preempted:
            self._in_flight[sequence.sequence_id].stream.progress.preempted_at.append(now)

    def _end_overdue(self) -> None:
        """End the requests that have waited too long; those that were let in once go on."""
        for sequence_id in self._queue_time.take_overdue():
            flight = self._in_flight.get(sequence_id)
            if flight is not None and not flight.sequence.was_admitted:
                limit = self._queue_time.max_queue_time_s
                flight.stream.fail(
                    OverloadedError(
                        f"Model is overloaded: the request was not let in within {limit:g} seconds "
                        "(MAX_QUEUE_TIME). Retry later, or raise MAX_QUEUE_TIME."
                    )
                )
                self.cancel(flight.sequence)
        self._set_queue_timer()

    def _set_queue_timer(self) -> None:
        """See to it that overdue requests end also while no step is planned."""
        delay_s = self._queue_time.until_next_s()
        if self._queue_timer is None and delay_s is not None:
            loop = asyncio.get_running_loop()
            self._queue_timer = loop.call_later(delay_s, self._on_queue_timer)

    def _on_queue_timer(self) -> None:
        self._queue_timer = None
        self._end_overdue()

    async def _send(self, plan: StepPlan) -> "_SentStep":
        now = time.perf_counter()
        traced = []
        for sequence in plan.sequences:
            flight = self._in_flight[sequence.sequence_id]
            flight.start(now)
            if flight.stream.progress.is_traced:
                traced.append(flight.stream.progress)
        step_id = await self._shards.send(plan)
        self._masks.expect(step_id, plan, self._in_flight)
        self._masks.compute()
        return _SentStep(step_id, kind_of(plan), plan.num_tokens, len(plan.images), now, traced)

    async def _receive(self, step: "_SentStep", scheduler: Scheduler) -> None:
        try:
            reply = await self._shards.receive(step.step_id)
        except ShardsLost:
            self._metrics.steps.lost(step.kind)
            raise
        # A step sent ahead of time begins when the one before it is done.
        began, now = max(step.sent_at, self._answered_at), time.perf_counter()
        self._answered_at = now
        self._metrics.steps.answered(
            step.kind, now - began, step.num_tokens, step.num_pictures, reply
        )
        for progress in step.traced:
            progress.step_done(reply)
        self._apply(reply, scheduler)
        self._metrics.steps.taken(step.kind, time.perf_counter() - now)

    def _apply(self, reply: shard_pb2.StepReply, scheduler: Scheduler) -> None:
        """Take a step's results. Requests cancelled meanwhile are no longer in flight."""
        for failure in reply.failures:
            if flight := self._in_flight.get(failure.sequence_id):
                logger.warning("request %d failed: %s", failure.sequence_id, failure.message)
                if flight.sequence.has_borrowed:
                    self._start_over(flight, scheduler)
                else:
                    self._fail(flight, GenerationError(failure.message))
        for scored in reply.prompt_logprobs:
            if flight := self._in_flight.get(scored.sequence_id):
                flight.add_prompt_logprobs(scored)
        now = time.perf_counter()
        for token in sampled_tokens(reply):
            if flight := self._in_flight.get(token.sequence_id):
                scheduler.append_token(flight.sequence, token.token_id)
                self._tell(flight, token, now)
        self._masks.compute()

    def _tell(self, flight: InFlight, token: SampledToken, now: float) -> None:
        try:
            if flight.tell(token, now):
                self.cancel(flight.sequence)
        except Exception:
            logger.exception("request %d failed in the router", token.sequence_id)
            self._fail(flight, GenerationError("internal error"))

    def _fail(self, flight: InFlight, error: RouterError) -> None:
        flight.stream.fail(error)
        self.cancel(flight.sequence, is_tainted=True)

    def _on_mask_failure(self, sequence_id: int, reason: str) -> None:
        logger.warning("request %d failed: %s", sequence_id, reason)
        flight = self._in_flight[sequence_id]
        flight.stream.fail(GenerationError(reason))
        self.cancel(flight.sequence)  # what it computed is sound, so others may find it

    def _start_over(self, flight: InFlight, scheduler: Scheduler) -> None:
        """Whoever read what another had computed may have failed by the other's fault."""
        del self._in_flight[flight.sequence.sequence_id]
        self._masks.release(flight.sequence.sequence_id)
        flight.sequence = scheduler.start_over(flight.sequence, next(self._ids))
        flight.stream.follow(partial(self.cancel, flight.sequence))
        self._in_flight[flight.sequence.sequence_id] = flight

    def _why_not_ready(self) -> str:
        if self._state is _ShardState.LOST:
            return "the server has lost a shard and is restarting"
        if self._is_draining:
            return "the server is shutting down; send the request to another one"
        return "the model is still loading; try again in a while"
