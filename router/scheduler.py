"""Which tokens are computed next. Pure: no clock, no I/O, so that every rule has a plain test.

Every step mixes what there is to do: one token for each decoding sequence, then chunks of prompts
as far as the step's token budget reaches. Sequences join and leave at any step. Blocks are given
as a sequence grows; when the pool is dry the youngest sequence is preempted and computed again
later, which its client does not notice. Full blocks are found again by their content.

A step may be planned before the tokens of the step before it are back ("lookahead"): a decode then
stands for the token that is still on its way. A sequence that turns out to have ended is released
in a later step and what was computed for it is dropped.

The rules, and the setting behind each:

    tokens per step       decodes + chunks never exceed MAX_BATCH_PREFILL_TOKENS
    sequences per step    never more than MAX_BATCH_SIZE are running
    when to let one in    at once while nothing runs or enough wait (WAITING_SERVED_RATIO),
                          else after MAX_WAITING_TOKENS decode steps
    whose prompt goes on  the oldest is sure of a share of the token budget, and so is one to be
                          let in after MAX_WAITING_TOKENS; the others come before the oldest for
                          the rest: short prompts do not wait for a long one
    who is let in first   preempted ones, then by priority, then fairly between keys, then by
                          arrival; one that does not fit may be overtaken MAX_OVERTAKES times
    image tiles per step  at most MAX_STEP_TILES, but always one whole image
    features kept         VISION_CACHE_TOKENS tokens, and the pictures that are next to be read
"""

from dataclasses import dataclass, field
from itertools import islice

from tessera.router.block_keys import extend_keys
from tessera.router.blocks import BlockPool
from tessera.router.image_store import ImageStore
from tessera.router.request import PreparedImage
from tessera.router.sequence import Sequence
from tessera.router.waiting import WaitingQueue

MAX_OVERTAKES = 16
"""Later requests that may be let in before one that does not fit; bounds how long it can wait."""

SURE_SHARE = 4
"""The oldest prompt and whoever is to be let in are sure of 1 / this of the budget each."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step may hold; see `RouterSettings` for the meaning of each."""

    max_step_tokens: int
    max_batch_size: int
    max_waiting_tokens: int
    waiting_served_ratio: float
    max_step_tiles: int
    vision_cache_tokens: int = 0
    prefix_caching: bool = True


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
    token_id: int | None  # None: the one the shards sampled last for it
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
    preempted: list[Sequence] = field(default_factory=list)  # put back to make room for the others

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


@dataclass(slots=True)
class SchedulerCounts:
    """What happened since the start; only ever grows."""

    preemptions: int = 0
    prefix_query_tokens: int = 0  # prompt tokens of sequences that were let in
    prefix_hit_tokens: int = 0  # those of them that were found in the cache
    vision_misses: int = 0  # pictures encoded
    vision_hits: int = 0  # pictures that did not have to be


class Scheduler:
    """Continuous batching over one block pool."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # oldest first
        self.counts = SchedulerCounts()
        self.images = ImageStore(limits.vision_cache_tokens)
        self._released: list[int] = []
        self._decodes_since_admission = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Validation has refused what could never fit."""
        self.waiting.append(sequence)
        self.images.need(sequence.sequence_id, _images_of(sequence))

    def next_step(self) -> StepPlan:
        """Decide one step; it is empty when there is nothing to do before tokens come back."""
        # Pictures let go while this step is planned are still read by it: they go in the next one.
        plan = StepPlan(released_images=self.images.take_released())
        budget = self.limits.max_step_tokens
        budget -= self._plan_decodes(plan, budget)
        may_admit = self._may_admit()
        self._plan_images(plan, may_admit)
        self._plan_prompts(plan, budget, may_admit)
        self._count_wait(plan)
        plan.released_sequence_ids, self._released = self._released, []
        return plan

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Note the token a step sampled."""
        sequence.token_ids.append(token_id)
        sequence.num_pending -= 1
        self._publish(sequence)

    def finish(self, sequence: Sequence, *, is_tainted: bool = False) -> None:
        """Forget a sequence that ended, failed or was cancelled, and take its blocks back.

        Args:
            is_tainted: what it computed is not to be trusted, so nobody may find it.
        """
        if not self._take_out(sequence):
            return
        if is_tainted:
            self.pool.forget(sequence.block_ids)
        if sequence.was_admitted:
            spared = len(sequence.request.images) - sequence.num_encoded
            self.counts.vision_hits += max(0, spared)
        self.images.done(sequence.sequence_id, _images_of(sequence))
        self._give_back(sequence)

    def start_over(self, sequence: Sequence, sequence_id: int) -> Sequence:
        """Queue a failed sequence once more, under another id and apart from the cache.

        What it had borrowed may be at fault: another one's failure that it has read.
        """
        again = Sequence(sequence_id, sequence.request, was_admitted=True, is_apart=True)
        again.token_ids = sequence.token_ids
        again.num_cached, again.num_encoded = sequence.num_cached, sequence.num_encoded
        again.num_losses = sequence.num_losses
        self._take_out(sequence)
        self.pool.forget(sequence.block_ids)
        self.images.need(sequence_id, _images_of(again))
        self.images.done(sequence.sequence_id, _images_of(sequence))
        self._give_back(sequence)
        self._put_back(again)
        return again

    def begin_anew(self, pool: BlockPool) -> None:
        """The shards are new ones with an empty cache: what was running waits, first of all."""
        self.pool = pool
        self.images = ImageStore(self.limits.vision_cache_tokens)
        self._released = []
        for sequence in reversed(self.running):
            self._put_back(sequence)
        self.running.clear()
        for sequence in self.waiting:
            sequence.forget_computed()
            self.images.need(sequence.sequence_id, _images_of(sequence))

    def _take_out(self, sequence: Sequence) -> bool:
        """Remove a sequence from wherever it is; False if it is over."""
        if sequence in self.running:
            self.running.remove(sequence)
            return True
        return self.waiting.remove(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that was let in before: first of all, and not to be overtaken."""
        sequence.num_overtaken = MAX_OVERTAKES
        self.waiting.put_back(sequence)

    def _plan_decodes(self, plan: StepPlan, budget: int) -> int:
        """One token for each decoding sequence, oldest first; returns the tokens used."""
        for sequence in list(self.running):
            if sequence.is_prefilling:  # or preempted a moment ago, to make room
                continue
            if sequence.is_exhausted or sequence.awaits_mask:
                continue  # its last tokens, or what may follow them, are on their way
            if len(plan.decodes) >= budget:
                break
            new_blocks = self._grow(sequence, plan)
            if new_blocks is None:
                continue  # it was itself the youngest and had to go
            position = sequence.num_computed
            known = position < len(sequence.token_ids)
            token_id = sequence.token_ids[position] if known else None
            plan.decodes.append(DecodePlan(sequence, token_id, position + 1, tuple(new_blocks)))
            sequence.num_computed += 1
            sequence.num_pending += 1
            self._publish(sequence)
        return len(plan.decodes)

    def _grow(self, sequence: Sequence, plan: StepPlan) -> list[int] | None:
        """Blocks for one more token; preempts from the youngest until there are enough."""
        missing = self.pool.blocks_for(sequence.num_computed + 1) - len(sequence.block_ids)
        if missing <= 0:
            return []
        while (blocks := self.pool.allocate(missing)) is None:
            # It is this sequence or one behind it, so none that is planned already.
            victim = self.running.pop()
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return None
        sequence.block_ids += blocks
        return blocks

    def _preempt(self, sequence: Sequence) -> None:
        """Put a sequence that ran back to the head of the queue; it will be computed anew."""
        self._give_back(sequence)
        sequence.num_computed = 0
        self.images.need(sequence.sequence_id, _images_of(sequence))
        self._put_back(sequence)
        self.counts.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        if sequence.sent_to_shards:
            self._released.append(sequence.sequence_id)
            sequence.sent_to_shards = False

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose tokens are known and planned."""
        if not (self.limits.prefix_caching and sequence.uses_cache):
            return
        known = min(sequence.num_computed, len(sequence.token_ids))
        full = min(known // self.pool.block_size, len(sequence.block_ids))
        if full <= sequence.num_published:
            return
        keys = extend_keys(sequence, self.pool.block_size)
        for index in range(sequence.num_published, full):
            self.pool.publish(sequence.block_ids[index], keys[index])
        sequence.num_published = full

    def _may_admit(self) -> bool:
        """Whether waiting sequences may join now; see the table at the top."""
        if not self.waiting or len(self.running) >= self.limits.max_batch_size:
            return False
        enough = len(self.waiting) >= len(self.running) * self.limits.waiting_served_ratio
        return not self.running or enough or self._patience_is_over()

    def _patience_is_over(self) -> bool:
        return self._decodes_since_admission >= self.limits.max_waiting_tokens

    def _plan_prompts(self, plan: StepPlan, budget: int, may_admit: bool) -> None:
        """Chunks of running prompts and of those let in now.

        The oldest prompt is planned last and takes what the others leave, so that short prompts do
        not wait for a long one, which still gets a sure share of every step. So does whoever has
        waited long enough to be let in.
        """
        prompts = [s for s in self.running if s.is_prefilling]
        share = -(-budget // SURE_SHARE)
        for_oldest = min(share, prompts[0].num_uncomputed) if prompts else 0
        for_newcomers = share if may_admit and self._patience_is_over() else 0
        budget -= for_oldest
        for sequence in prompts[1:]:
            budget -= self._plan_chunk(plan, sequence, budget - for_newcomers)
        if may_admit:
            budget = self._admit(plan, budget)
        if prompts:
            self._plan_chunk(plan, prompts[0], for_oldest + budget)

    def _plan_images(self, plan: StepPlan, may_admit: bool) -> None:
        """Encode pictures of running prompts first, then of those that wait, together.

        What is running, and what is next in line, may always go on, one picture at a time if need
        be; those behind only as far as the features have room.
        """
        tiles = 0
        candidates = [s for s in self.running if s.is_prefilling]
        num_urgent = len(candidates) + 1
        if may_admit:
            room = self.limits.max_batch_size - len(self.running)
            candidates += islice(self.waiting, room)
        for place, sequence in enumerate(candidates):
            if not sequence.request.images:
                continue  # spares the look into the prefix cache
            is_next = place < num_urgent
            first = sequence.num_computed or self._num_findable(sequence)
            for placed in sequence.images_between(first, len(sequence.token_ids)):
                image = placed.image
                if self.images.is_encoded(image):
                    continue
                if plan.images and tiles + image.num_tiles > self.limits.max_step_tiles:
                    return
                if not is_next and not self.images.has_room_for(image):
                    return
                is_next = False
                tiles += image.num_tiles
                plan.images.append(image)
                self.images.mark_encoded(image)
                sequence.num_encoded += 1
                self.counts.vision_misses += 1

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """The next piece of a running prompt; returns the tokens used."""
        first = sequence.num_computed
        last = self._chunk_end(sequence, first, budget)
        if last <= first:
            return 0
        is_start = not sequence.sent_to_shards
        new_blocks = tuple(sequence.block_ids) if is_start else ()
        is_last = last == len(sequence.token_ids)
        plan.chunks.append(ChunkPlan(sequence, first, last, new_blocks, is_start, is_last))
        sequence.num_computed = last
        sequence.num_pending += is_last
        sequence.sent_to_shards = True
        self._images_read(sequence, first)
        self._publish(sequence)
        return last - first

    def _images_read(self, sequence: Sequence, first: int) -> None:
        """Let go of pictures whose last placeholder is planned and that do not come again."""
        last = sequence.num_computed
        later = {
            placed.image.content_hash
            for placed in sequence.images_between(last, len(sequence.token_ids))
        }
        read = [
            placed.image
            for placed in sequence.images_between(first, last)
            if placed.image.content_hash not in later
        ]
        self.images.done(sequence.sequence_id, read)

    def _chunk_end(self, sequence: Sequence, first: int, budget: int) -> int:
        """As far as the budget reaches, but not into a picture that is not encoded yet."""
        last = min(len(sequence.token_ids), first + max(0, budget))
        for placed in sequence.images_between(first, last):
            if not self.images.is_encoded(placed.image):
                return max(first, min(last, placed.offset))
        return last

    def _admit(self, plan: StepPlan, budget: int) -> int:
        """Let sequences in, in the queue's order, while there is room; returns the budget left."""
        passed_over: list[Sequence] = []
        for sequence in list(islice(self.waiting, MAX_OVERTAKES)):
            if budget <= 0 or len(self.running) >= self.limits.max_batch_size:
                break
            used = self._let_in(plan, sequence, budget)
            if used:
                budget -= used
                for overtaken in passed_over:
                    overtaken.num_overtaken += 1
            elif sequence.num_overtaken >= MAX_OVERTAKES:
                break  # nobody else until it fits
            else:
                passed_over.append(sequence)
        return budget

    def _let_in(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """Start a waiting sequence if it fits now; returns the tokens planned for it."""
        if sequence.num_pending:
            return 0  # preempted with a token on its way, which belongs to what is computed again
        cached = self._cached_blocks(sequence)
        first = len(cached) * self.pool.block_size
        missing = self.pool.blocks_for(len(sequence.token_ids)) - len(cached)
        fits = self.pool.num_free >= missing + len(self.running)  # one each may be needed soon
        if not fits or self._chunk_end(sequence, first, budget) <= first:
            self.pool.free(cached)
            return 0
        blocks = self.pool.allocate(missing)
        assert blocks is not None
        sequence.block_ids = cached + blocks
        sequence.num_computed = first
        sequence.num_published = len(cached)
        sequence.has_borrowed = bool(cached)
        if not sequence.was_admitted:
            sequence.was_admitted, sequence.num_cached = True, first
            self.counts.prefix_query_tokens += len(sequence.token_ids)
            self.counts.prefix_hit_tokens += first
        self.waiting.let_in(sequence)
        self.running.append(sequence)
        self._decodes_since_admission = 0
        return self._plan_chunk(plan, sequence, budget)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Hold the blocks that are known already."""
        return self.pool.match(self._prefix_keys(sequence))

    def _num_findable(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that need not be computed, as things are now."""
        return self.pool.count_findable(self._prefix_keys(sequence)) * self.pool.block_size

    def _prefix_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that may be taken from the cache; one token is left to compute."""
        request = sequence.request
        if not (self.limits.prefix_caching and sequence.uses_cache):
            return []
        if request.sampling.prompt_logprobs:
            return []  # every position must be computed to be scored
        keys = extend_keys(sequence, self.pool.block_size)
        return keys[: (len(sequence.token_ids) - 1) // self.pool.block_size]

    def _count_wait(self, plan: StepPlan) -> None:
        """Count decode steps that went by while somebody waited."""
        if not self.waiting:
            self._decodes_since_admission = 0
        elif plan.decodes:
            self._decodes_since_admission += 1


def _images_of(sequence: Sequence) -> list[PreparedImage]:
    return [placed.image for placed in sequence.request.images]
