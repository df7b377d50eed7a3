"""Which tokens guided sequences may sample next, computed while the shards compute the step.

A step is sent before the tokens of the step before it are back, so the masks of its guided rows
follow it, each as soon as the tokens before it are known. Every such row gets one: also when its
sequence is over or has failed meanwhile, because the shard waits for it.
"""

import asyncio
import ctypes
import logging
import os
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Container, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llguidance import LLExecutor, LLMatcher

from tessera.router.guidance_compile import Guide
from tessera.router.scheduler import StepPlan
from tessera.router.sequence import Sequence
from tessera.router.shards import ShardGroup, ShardsLost

logger = logging.getLogger(__name__)

MAX_MASK_THREADS = 8

ANY_TOKEN = b""
"""The mask of a row whose token nobody will read."""

NOT_FOLLOWED = "the grammar could not be followed any further"


@dataclass(eq=False, slots=True)
class _Guided:
    """A guided sequence and its rows under way."""

    sequence: Sequence
    guide: Guide
    # Step id, and the number of generated tokens before it, of each row whose mask is not sent.
    awaited: deque[tuple[int, int]] = field(default_factory=deque)
    is_busy: bool = False  # the mask of the first of them is being computed
    matcher: LLMatcher | None = None  # only the one job under way touches it
    num_consumed: int = 0

    @property
    def is_due(self) -> bool:
        """Whether a mask can be computed: all tokens before it are known."""
        if self.is_busy or not self.awaited:
            return False
        return self.awaited[0][1] == self.sequence.num_generated


class GuidanceMasks:
    """The masks of the steps under way. Its methods are for the event loop's thread."""

    def __init__(self, shards: ShardGroup, fail: Callable[[int, str], None]) -> None:
        """
        Args:
            fail: ends the request of a sequence id, for a reason in words.
        """
        self._shards = shards
        self._fail = fail
        self._guided: dict[int, _Guided] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(2, "masks")  # none is started before it is needed
        self._executor: LLExecutor | None = None

    def expect(self, step_id: int, plan: StepPlan, live: Container[int]) -> None:
        """Note which masks a step waits for.

        Args:
            step_id: it was just sent.
            live: ids of the sequences that are not over; others' rows wait in vain.
        """
        sampled = [row.sequence for row in plan.decodes]
        sampled += [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        over: dict[int, bytes] = {}
        for sequence in sampled:
            guide, sequence_id = sequence.request.guide, sequence.sequence_id
            if guide is None:
                continue
            if sequence_id not in live:
                over[sequence_id] = ANY_TOKEN
                continue
            guided = self._guided.setdefault(sequence_id, _Guided(sequence, guide))
            before = sequence.num_generated + sequence.num_pending - 1
            guided.awaited.append((step_id, before))
        if over:
            self._run(self._tell(step_id, over))

    def compute(self) -> None:
        """Start the masks whose tokens are known; called whenever some became so."""
        due: defaultdict[int, list[_Guided]] = defaultdict(list)
        for guided in self._guided.values():
            if guided.is_due:
                guided.is_busy = True
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
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compute_and_tell(self, step_id: int, rows: list[_Guided]) -> None:
        jobs = [(guided, guided.sequence.token_ids[_known(guided) :]) for guided in rows]
        if self._executor is None:
            self._executor = LLExecutor(min(MAX_MASK_THREADS, os.cpu_count() or 1))
        loop = asyncio.get_running_loop()
        try:
            masks = await loop.run_in_executor(self._threads, _masks, self._executor, jobs)
        except Exception:
            logger.exception("masks of a step could not be computed")
            masks = [None] * len(rows)
        told: dict[int, bytes] = {}
        for guided, mask in zip(rows, masks, strict=True):
            guided.is_busy = False
            sequence_id = guided.sequence.sequence_id
            if self._guided.get(sequence_id) is not guided:
                continue  # released meanwhile
            if mask is None:
                self._fail(sequence_id, NOT_FOLLOWED)  # which releases it
            else:
                guided.awaited.popleft()
                told[sequence_id] = mask
        if told:
            await self._tell(step_id, told)

    async def _tell(self, step_id: int, masks: Mapping[int, bytes]) -> None:
        try:
            await self._shards.send_masks(step_id, masks)
        except ShardsLost:
            logger.debug("masks of step %d found no shard", step_id)  # whoever awaits it will say


def _known(guided: _Guided) -> int:
    """Position of the first token that its matcher has not seen."""
    return guided.sequence.num_prompt_tokens + guided.num_consumed


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


def _advanced(guided: _Guided, token_ids: list[int]) -> LLMatcher:
    """Its matcher after these tokens; an end-of-text token after the end changes nothing."""
    if guided.matcher is None:
        guided.matcher = guided.guide.start()
    if not guided.matcher.is_stopped():
        guided.matcher.consume_tokens(token_ids)
    guided.num_consumed += len(token_ids)
    return guided.matcher
