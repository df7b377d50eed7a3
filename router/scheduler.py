"""Which tokens are computed next. Pure: no clock, no I/O, so that every rule has a plain test.

Every step mixes what there is to do: one token for each decoding sequence, then chunks of prompts
as far as the step's token budget reaches. Sequences join and leave at any step. Blocks are given
as a sequence grows; when the pool is dry the youngest sequence is preempted and computed again
later, which its client does not notice.

The rules, and the setting behind each:

    tokens per step       decodes + chunks never exceed MAX_BATCH_PREFILL_TOKENS
    sequences per step    never more than MAX_BATCH_SIZE are running
    when to let one in    at once while nothing runs or enough wait (WAITING_SERVED_RATIO),
                          else after MAX_WAITING_TOKENS decode steps
    image tiles per step  at most `max_step_tiles`, but always one whole image
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from tessera.router.blocks import BlockPool
from tessera.router.image_store import ImageStore
from tessera.router.request import PreparedImage
from tessera.router.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step may hold; see `RouterSettings` for the meaning of each."""

    max_step_tokens: int
    max_batch_size: int
    max_waiting_tokens: int
    waiting_served_ratio: float
    max_step_tiles: int


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Compute the tokens [first, last) of a sequence; sample after them when `is_last`."""

    sequence: Sequence
    first: int
    last: int
    new_block_ids: tuple[int, ...]
    is_start: bool  # the shards hear of this sequence for the first time
    is_last: bool


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Compute a sequence's newest token and sample the next."""

    sequence: Sequence
    token_id: int
    context_len: int
    new_block_ids: tuple[int, ...]


@dataclass(slots=True)
class StepPlan:
    """One step for the shards."""

    decodes: list[DecodePlan] = field(default_factory=list)
    chunks: list[ChunkPlan] = field(default_factory=list)
    images: list[PreparedImage] = field(default_factory=list)
    released_sequence_ids: list[int] = field(default_factory=list)
    released_images: list[bytes] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the shards need not hear of it."""
        work = self.decodes or self.chunks or self.images
        return not (work or self.released_sequence_ids or self.released_images)

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return len(self.decodes) + sum(chunk.last - chunk.first for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        """Sequences the step computes something for."""
        return [row.sequence for row in self.decodes] + [c.sequence for c in self.chunks]


class Scheduler:
    """Continuous batching over one block pool."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._images = ImageStore()
        self._released: list[int] = []
        self._decodes_since_admission = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Validation has refused what could never fit."""
        self.waiting.append(sequence)
        self._images.need(sequence.sequence_id, _images_of(sequence))

    def next_step(self) -> StepPlan:
        """Decide one step; it is empty when there is nothing to do."""
        # Pictures let go while this step is planned are still read by it: they go in the next one.
        plan = StepPlan(released_images=self._images.take_released())
        budget = self.limits.max_step_tokens
        budget -= self._plan_decodes(plan, budget)
        may_admit = self._may_admit()
        self._plan_images(plan, may_admit)
        for sequence in [s for s in self.running if _is_prefilling(s)]:
            budget -= self._plan_chunk(plan, sequence, budget)
        if may_admit:
            self._admit(plan, budget)
        self._count_wait(plan)
        plan.released_sequence_ids, self._released = self._released, []
        return plan

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Note the token a step sampled for a running sequence."""
        sequence.token_ids.append(token_id)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, failed or was cancelled, and take its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            return
        self._images.done(sequence.sequence_id, _images_of(sequence))
        self._give_back(sequence)

    def _plan_decodes(self, plan: StepPlan, budget: int) -> int:
        """One token for each decoding sequence, oldest first; returns the tokens used."""
        for sequence in list(self.running):
            if _is_prefilling(sequence):  # or preempted a moment ago, to make room
                continue
            if len(plan.decodes) >= budget:
                break
            new_blocks = self._grow(sequence, plan)
            if new_blocks is None:
                continue  # it was itself the youngest and had to go
            plan.decodes.append(
                DecodePlan(
                    sequence,
                    sequence.token_ids[sequence.num_computed],
                    sequence.num_computed + 1,
                    tuple(new_blocks),
                )
            )
            sequence.num_computed += 1
        return len(plan.decodes)

    def _grow(self, sequence: Sequence, plan: StepPlan) -> list[int] | None:
        """Blocks for one more token; preempts from the youngest until there are enough."""
        missing = self.pool.blocks_for(sequence.num_computed + 1) - len(sequence.block_ids)
        if missing <= 0:
            return []
        while (blocks := self.pool.allocate(missing)) is None:
            planned = {id(row.sequence) for row in plan.decodes}
            victim = next(s for s in reversed(self.running) if id(s) not in planned)
            self._preempt(victim)
            if victim is sequence:
                return None
        sequence.block_ids += blocks
        return blocks

    def _preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back to the head of the queue; it will be computed anew."""
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        self._images.need(sequence.sequence_id, _images_of(sequence))
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        if sequence.sent_to_shards:
            self._released.append(sequence.sequence_id)
            sequence.sent_to_shards = False

    def _may_admit(self) -> bool:
        """Whether waiting sequences may join now; see the table at the top."""
        if not self.waiting or len(self.running) >= self.limits.max_batch_size:
            return False
        enough = len(self.waiting) >= len(self.running) * self.limits.waiting_served_ratio
        patience_over = self._decodes_since_admission >= self.limits.max_waiting_tokens
        return not self.running or enough or patience_over

    def _plan_images(self, plan: StepPlan, may_admit: bool) -> None:
        """Encode pictures of running prompts first, then of those that wait, together."""
        tiles = 0
        candidates = [s for s in self.running if _is_prefilling(s)]
        if may_admit:
            room = self.limits.max_batch_size - len(self.running)
            candidates += islice(self.waiting, room)
        for sequence in candidates:
            for placed in sequence.images_between(sequence.num_computed, len(sequence.token_ids)):
                image = placed.image
                if self._images.is_encoded(image):
                    continue
                if plan.images and tiles + image.num_tiles > self.limits.max_step_tiles:
                    return
                tiles += image.num_tiles
                plan.images.append(image)
                self._images.mark_encoded(image)

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """The next piece of a running prompt; returns the tokens used."""
        first = sequence.num_computed
        last = self._chunk_end(sequence, budget)
        if last <= first:
            return 0
        is_start = not sequence.sent_to_shards
        new_blocks = tuple(sequence.block_ids) if is_start else ()
        is_last = last == len(sequence.token_ids)
        plan.chunks.append(ChunkPlan(sequence, first, last, new_blocks, is_start, is_last))
        sequence.num_computed = last
        sequence.sent_to_shards = True
        read = [
            placed.image
            for placed in sequence.images_between(first, last)
            if placed.offset + placed.image.num_tokens <= last
        ]
        self._images_read(sequence, read)
        return last - first

    def _images_read(self, sequence: Sequence, read: list[PreparedImage]) -> None:
        """Let go of pictures whose last placeholder is planned and that do not come again."""
        later = {
            placed.image.content_hash
            for placed in sequence.images_between(sequence.num_computed, len(sequence.token_ids))
        }
        done = [image for image in read if image.content_hash not in later]
        self._images.done(sequence.sequence_id, done)

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        """As far as the budget reaches, but not into a picture that is not encoded yet."""
        last = min(len(sequence.token_ids), sequence.num_computed + max(0, budget))
        for placed in sequence.images_between(sequence.num_computed, last):
            if not self._images.is_encoded(placed.image):
                return min(last, placed.offset)
        return last

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Take from the head of the queue while budget, batch and pool have room."""
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_batch_size:
            head = self.waiting[0]
            if self._chunk_end(head, budget) <= head.num_computed:
                return  # its picture waits for a later step
            # Every running sequence may need a block soon; leave them one each.
            needed = self.pool.blocks_for(len(head.token_ids))
            if self.pool.num_free < needed + len(self.running):
                return
            blocks = self.pool.allocate(needed)
            assert blocks is not None
            head.block_ids = blocks
            self.running.append(self.waiting.popleft())
            self._decodes_since_admission = 0
            budget -= self._plan_chunk(plan, head, budget)

    def _count_wait(self, plan: StepPlan) -> None:
        """Count decode steps that went by while somebody waited."""
        if not self.waiting:
            self._decodes_since_admission = 0
        elif plan.decodes:
            self._decodes_since_admission += 1


def _is_prefilling(sequence: Sequence) -> bool:
    """Whether a running sequence still has prompt (or rebuilt) tokens to compute by chunks."""
    in_prompt = sequence.num_computed < sequence.num_prompt_tokens
    return in_prompt or sequence.num_uncomputed > 1 or not sequence.sent_to_shards


def _images_of(sequence: Sequence) -> list[PreparedImage]:
    return [placed.image for placed in sequence.request.images]
