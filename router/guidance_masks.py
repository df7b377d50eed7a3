"""Which tokens guided sequences may sample next, computed while the shards compute the step.

A step is sent before the tokens of the step before it are back, so the masks of its guided rows
follow it, each as soon as the tokens before it are known. Every such row gets one: also when its
sequence is over or has failed meanwhile, because the shard waits for it.

Where a mask takes long, it comes first and its step after it: such a sequence is planned only once
its mask is there, so that the others of a step never wait for it.
"""

import asyncio
import ctypes
import logging
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Container, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llguidance import LLExecutor, LLMatcher

from tessera.proto.processors import usable_processors
from tessera.router.guidance_compile import Guide, known_reason
from tessera.router.scheduler import StepPlan
from tessera.router.sequence import Sequence
from tessera.router.shards import ShardGroup, ShardsLost

logger = logging.getLogger(__name__)

MAX_MASK_THREADS = 8

ANY_TOKEN = b""
"""The mask of a row whose token nobody will read."""

NOT_FOLLOWED = "the grammar could not be followed any further: "
FORBIDDEN = "it does not allow what was generated"
ENDLESS = "it takes too long; use rules with one reading, or fewer alternatives"

SUSPECT_S, SUSPECT_ROW_S = 0.02, 0.001
"""Masks computed together should take no longer, in all and for each; else each is timed alone."""

SLOW_S = 0.005
"""Computation for one token from which on no step waits for it."""

FAIR_S, MAX_EXCESS_S = 0.05, 2.0
"""Computation for one token, and how much more than that those of one answer may take together."""


@dataclass(eq=False, slots=True)
class _Guided:
    """A guided sequence and its rows under way."""

    sequence: Sequence
    guide: Guide
    is_slow: bool  # its masks come before its steps
    is_suspect: bool = False  # it may be
    # Step id, and the number of generated tokens before it, of each row whose mask is not sent.
    awaited: deque[tuple[int, int]] = field(default_factory=deque)
    ready: bytes | None = None  # the mask of the next token, which no step awaits yet
    is_busy: bool = False  # the mask of the next token is being computed
    excess_s: float = 0.0  # computation beyond what is fair
    matcher: LLMatcher | None = None  # only the one job under way touches it
    num_consumed: int = 0

    @property
    def is_due(self) -> bool:
        """Whether a mask is wanted and can be computed: all tokens before it are known."""
        if self.is_busy:
            return False
        if self.awaited:
            return self.awaited[0][1] == self.sequence.num_generated
        return self.is_slow and self.ready is None and not self.sequence.num_pending


class GuidanceMasks:
    """The masks of the steps under way. Its methods are for the event loop's thread."""

    def __init__(
        self, shards: ShardGroup, fail: Callable[[int, str], None], wake: Callable[[], None]
    ) -> None:
        """
        Args:
            fail: ends the request of a sequence id, for a reason in words.
            wake: called when a sequence that waited for its mask can be planned again.
        """
        self._shards = shards
        self._fail = fail
        self._wake = wake
        self._guided: dict[int, _Guided] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # No thread is started before it is needed.
        self._threads = ThreadPoolExecutor(2, "masks")
        self._slow_threads = ThreadPoolExecutor(2, "slow-masks")
        self._executor: LLExecutor | None = None

    def expect(self, step_id: int, plan: StepPlan, live: Container[int]) -> None:
        """Note which masks a step waits for.

        Args:
            step_id: it was just sent.
            live: ids of the sequences that are not over; others' rows wait in vain.
        """
        sampled = [row.sequence for row in plan.decodes]
        sampled += [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        known: dict[int, bytes] = {}
        for sequence in sampled:
            guide, sequence_id = sequence.request.guide, sequence.sequence_id
            if guide is None:
                continue
            if sequence_id not in live:
                known[sequence_id] = ANY_TOKEN
                continue
            guided = self._guided.get(sequence_id)
            if guided is None:
                guided = self._guided[sequence_id] = _Guided(sequence, guide, guide.is_slow)
            if guided.ready is not None:
                known[sequence_id], guided.ready = guided.ready, None
            else:
                before = sequence.num_generated + sequence.num_pending - 1
                guided.awaited.append((step_id, before))
            sequence.awaits_mask = guided.is_slow
        if known:
            self._run(self._tell(step_id, known))

    def compute(self) -> None:
        """Start the masks whose tokens are known; called whenever some became so."""
        due: defaultdict[int, list[_Guided]] = defaultdict(list)
        for guided in self._guided.values():
            if guided.is_due:
                guided.is_busy = True
                if guided.is_slow or guided.is_suspect:
                    self._run(self._compute_alone(guided))
                else:
                    due[guided.awaited[0][0]].append(guided)
        for step_id, rows in due.items():
            self._run(self._compute_and_tell(step_id, rows))

    def release(self, sequence_id: int) -> None:
        """A sequence is over: its rows under way no longer wait. Harmless for any other."""
        guided = self._guided.pop(sequence_id, None)
        for step_id, _ in guided.awaited if guided else ():
            self._run(self._tell(step_id, {sequence_id: ANY_TOKEN}))

    def close(self) -> None:
        """Stop; nothing is sent any more."""
        for task in self._tasks:
            task.cancel()
        for threads in (self._threads, self._slow_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compute_and_tell(self, step_id: int, rows: list[_Guided]) -> None:
        """All that a step waits for and that is known to be quick."""
        jobs = [(guided, _unseen(guided)) for guided in rows]
        if self._executor is None:
            self._executor = LLExecutor(min(MAX_MASK_THREADS, len(usable_processors())))
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        try:
            masks = await loop.run_in_executor(self._threads, _masks, self._executor, jobs)
        except Exception:
            logger.exception("masks of a step could not be computed")
            masks = [None] * len(rows)
        took_s = time.perf_counter() - started
        told: dict[int, bytes] = {}
        for guided, mask in zip(rows, masks, strict=True):
            guided.is_suspect = took_s > SUSPECT_S + SUSPECT_ROW_S * len(rows)
            usable = self._usable(guided, mask)
            if usable is not None:
                guided.awaited.popleft()
                told[guided.sequence.sequence_id] = usable
        if told:
            await self._tell(step_id, told)

    async def _compute_alone(self, guided: _Guided) -> None:
        """What may take long; a step that does not wait for it yet will be planned with it."""
        loop = asyncio.get_running_loop()
        try:
            mask, took_s = await loop.run_in_executor(
                self._slow_threads, _timed_mask, guided, _unseen(guided)
            )
        except Exception:
            logger.exception("a mask could not be computed")
            mask, took_s = None, 0.0
        guided.excess_s = max(0.0, guided.excess_s + took_s - FAIR_S)
        usable = self._usable(guided, mask)
        if usable is None:
            return
        guided.is_suspect = False
        guided.is_slow = guided.is_slow or took_s > SLOW_S
        sequence = guided.sequence
        if guided.awaited:
            sequence.awaits_mask = guided.is_slow
            step_id, _ = guided.awaited.popleft()
            await self._tell(step_id, {sequence.sequence_id: usable})
        else:
            guided.ready, sequence.awaits_mask = usable, False
            self._wake()

    def _usable(self, guided: _Guided, mask: bytes | None) -> bytes | None:
        """The mask if its sequence goes on with it; one that failed or took too long ends it."""
        guided.is_busy = False
        sequence_id = guided.sequence.sequence_id
        if self._guided.get(sequence_id) is not guided:
            return None  # released meanwhile
        if mask is not None and guided.excess_s <= MAX_EXCESS_S:
            return mask
        reason = ENDLESS if mask is not None else _reason(guided.matcher)
        logger.warning("grammar %s failed in an answer: %s", guided.guide.digest, reason)
        self._fail(sequence_id, NOT_FOLLOWED + reason)  # which releases it
        return None

    async def _tell(self, step_id: int, masks: Mapping[int, bytes]) -> None:
        try:
            await self._shards.send_masks(step_id, masks)
        except ShardsLost:
            logger.debug("masks of step %d found no shard", step_id)  # whoever awaits it will say


def _unseen(guided: _Guided) -> list[int]:
    """The tokens that its matcher has not seen."""
    sequence = guided.sequence
    return sequence.token_ids[sequence.num_prompt_tokens + guided.num_consumed :]


def _masks(executor: LLExecutor, jobs: Seq[tuple[_Guided, list[int]]]) -> list[bytes | None]:
    """The mask of each row once its new tokens are consumed, None where that fails; in a thread."""
    matchers = [_advanced(guided, token_ids) for guided, token_ids in jobs]
    size = jobs[0][0].guide.mask_bytes
    buffer = (ctypes.c_char * (size * len(jobs)))()
    places = [(matcher, index) for index, matcher in enumerate(matchers)]
    executor.unsafe_compute_mask_ptr(places, ctypes.addressof(buffer), size, len(jobs))
    masks = memoryview(buffer)
    return [
        None if matcher.is_error() else bytes(masks[index * size : (index + 1) * size])
        for matcher, index in places
    ]


def _timed_mask(guided: _Guided, token_ids: list[int]) -> tuple[bytes | None, float]:
    """The mask of one row, and the seconds of computation for it; in a thread."""
    started = time.thread_time()
    matcher = _advanced(guided, token_ids)
    mask = matcher.compute_bitmask()
    took_s = time.thread_time() - started
    return None if matcher.is_error() else mask, took_s / max(1, len(token_ids))


def _advanced(guided: _Guided, token_ids: list[int]) -> LLMatcher:
    """Its matcher after these tokens; an end-of-text token after the end changes nothing."""
    if guided.matcher is None:
        guided.matcher = guided.guide.start()
    for token_id in token_ids:  # each holds the interpreter, so one by one
        if guided.matcher.is_stopped():
            break
        guided.matcher.consume_token(token_id)
    guided.num_consumed += len(token_ids)
    return guided.matcher


def _reason(matcher: LLMatcher | None) -> str:
    """Why it goes no further, without a word of the grammar."""
    message = "" if matcher is None else matcher.get_error()
    return known_reason(message) or FORBIDDEN
