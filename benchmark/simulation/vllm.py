"""A model of vLLM v1's scheduling policy (first come, first served), to compare with.

This is the policy re-told from its published behaviour, not that software, and what the simulator
says of it is not a measurement of that software. Where a detail was in doubt, the reading that
favours it was taken. Modelled:

    budget           one of tokens for each step; whoever runs comes first, in the order of
                     admission, a decode with one token and a prompt with all that is left. So
                     prompts that waited for their pictures stall decodes admitted after them
    queue            strict first come, first served; the first request that cannot start now ends
                     the scan. No keys, no overtaking
    admission        when the whole known sequence fits the free blocks, and the batch size allows;
                     not in a step that preempted. Blocks are taken for the chunk only
    growth           block by block; when none is left the one admitted last goes back to the
                     queue's head and is computed again, as far as the prefix cache has lost it
    prefix cache     full blocks by content, pictures by their hash, generated tokens included
    pictures         encoded in the step whose chunk first reaches them, within a budget of features
                     a step; kept by hash in a cache of the same size; a chunk ends before a picture
                     that does not fit either
    async scheduling ASSUMED: a step is planned while the one before it runs, as recent releases do
                     by default. `--set lookahead=0` is its synchronous step
    clients leaving  noticed at once

The budget is MAX_BATCH_PREFILL_TOKENS for both, as ratios at different budgets would say little;
its own default on a device of this class is larger, which here lengthens its stalls and hardly
changes its first tokens (`--set max_batch_prefill_tokens=8192`). Features are bounded as its
defaults say: as many as the token budget, or one largest picture.

Not modelled: priorities, speculative decoding, structured output, cascade attention, transfers of
caches, the limit on concurrent long prompts (off by default).
"""

from collections import deque
from dataclasses import dataclass

from benchmark.simulation.encoder_cache import EncoderCache
from benchmark.simulation.policy import SimulatedStep
from tessera.router.block_keys import extend_keys
from tessera.router.blocks import BlockPool
from tessera.router.request import PreparedImage
from tessera.router.scheduler import SchedulerLimits
from tessera.router.sequence import Sequence


@dataclass(slots=True)
class _Left:
    """What a step being planned has left."""

    tokens: int
    features: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Compute a sequence's tokens [first, last), and these pictures before that."""

    sequence: Sequence
    first: int
    last: int
    images: list[PreparedImage]


class VllmPolicy:
    """First come, first served within a token budget, with blocks on demand."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, *, largest_picture: int) -> None:
        self.limits = limits
        self.pool = pool
        self.num_preemptions = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of admission
        self._encoder = EncoderCache(max(limits.max_step_tokens, largest_picture))

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def feature_tokens(self) -> int:
        """Features of pictures the device holds."""
        return self._encoder.used

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def next_step(self) -> SimulatedStep | None:
        """Those that run go on; others start if nobody had to make room."""
        step = SimulatedStep()
        left = _Left(self.limits.max_step_tokens, self._encoder.size)
        before = self.num_preemptions
        self._go_on(step, left)
        if self.num_preemptions == before:
            self._admit(step, left)
        return step if step.work.tokens else None

    def take_token(self, sequence: Sequence, token_id: int) -> None:
        """Note a token; it may fill a block."""
        sequence.token_ids.append(token_id)
        sequence.num_pending -= 1
        self._publish(sequence)

    def drop_token(self, sequence: Sequence) -> None:
        """The sequence is forgotten already; nothing to do."""

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._let_go(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A request is aborted at once."""
        self.finish(sequence)

    def _go_on(self, step: SimulatedStep, left: _Left) -> None:
        for sequence in list(self._running):
            if left.tokens <= 0 or sequence not in self._running:
                break  # whoever comes after one that was preempted was preempted before it
            if sequence.is_exhausted:
                continue  # its last token is on its way
            chunk = self._chunk(sequence, sequence.num_computed, left)
            if chunk.last > chunk.first and self._grow(chunk):
                self._compute(chunk, step, left)

    def _grow(self, chunk: _Chunk) -> bool:
        """Blocks for a chunk; False if its own sequence had to make room."""
        sequence = chunk.sequence
        missing = self.pool.blocks_for(chunk.last) - len(sequence.block_ids)
        while (blocks := self.pool.allocate(max(0, missing))) is None:
            victim = self._running.pop()
            self._let_go(victim)
            victim.num_computed = victim.num_published = 0
            self._waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        sequence.block_ids += blocks
        return True

    def _admit(self, step: SimulatedStep, left: _Left) -> None:
        while self._waiting and left.tokens > 0:
            sequence = self._waiting[0]
            if self.num_running >= self.limits.max_batch_size or not self._start(sequence, left):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            step.started.append(sequence)
            self._compute(self._chunk(sequence, sequence.num_computed, left), step, left)

    def _start(self, sequence: Sequence, left: _Left) -> bool:
        """Blocks for a waiting sequence's first chunk, or none."""
        if sequence.num_pending:
            return False  # preempted with a token on its way, which is computed again with the rest
        cached = self._match(sequence)
        chunk = self._chunk(sequence, len(cached) * self.pool.block_size, left)
        whole = self.pool.blocks_for(len(sequence.token_ids)) - len(cached)
        blocks = None
        if chunk.last > chunk.first and whole <= self.pool.num_free:
            blocks = self.pool.allocate(self.pool.blocks_for(chunk.last) - len(cached))
        sequence.block_ids = cached + (blocks or [])
        if blocks is None:
            self._let_go(sequence)
            return False
        sequence.num_computed = chunk.first
        sequence.num_published = len(cached)
        if not sequence.was_admitted:
            sequence.was_admitted, sequence.num_cached = True, chunk.first
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        """Hold the blocks that are known; one token is left to compute."""
        if not self.limits.prefix_caching:
            return []
        keys = extend_keys(sequence, self.pool.block_size)
        return self.pool.match(keys[: (len(sequence.token_ids) - 1) // self.pool.block_size])

    def _chunk(self, sequence: Sequence, first: int, left: _Left) -> _Chunk:
        """As far as the budgets reach from `first`; empty if they reach nowhere."""
        last = first + min(left.tokens, len(sequence.token_ids) + sequence.num_pending - first)
        encoded: dict[bytes, PreparedImage] = {}
        tokens = 0
        for placed in sequence.images_between(first, last):
            image = placed.image
            if image.content_hash in encoded or self._encoder.hold(image, sequence.sequence_id):
                continue
            tokens += image.num_tokens
            if tokens > left.features or not self._encoder.make_room(tokens):
                last = max(first, placed.offset)
                break
            encoded[image.content_hash] = image
        return _Chunk(sequence, first, last, list(encoded.values()))

    def _compute(self, chunk: _Chunk, step: SimulatedStep, left: _Left) -> None:
        sequence = chunk.sequence
        for image in chunk.images:
            self._encoder.store(image, sequence.sequence_id)
            step.work.add_image(image.num_tiles)
            left.features -= image.num_tokens
        left.tokens -= chunk.last - chunk.first
        if sequence.num_generated + sequence.num_pending and chunk.last == chunk.first + 1:
            step.work.add_decode(chunk.last)
        else:
            step.work.add_chunk(chunk.first, chunk.last)
        sequence.num_computed = chunk.last
        if sequence.num_uncomputed == 0:
            sequence.num_pending += 1
            step.sampling.append(sequence)
        self._release_read(sequence)
        self._publish(sequence)

    def _release_read(self, sequence: Sequence) -> None:
        for placed in sequence.request.images:
            if placed.offset + placed.image.num_tokens <= sequence.num_computed:
                self._encoder.release(placed.image, sequence.sequence_id)

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose tokens are known and planned."""
        if not self.limits.prefix_caching:
            return
        known = min(sequence.num_computed, len(sequence.token_ids))
        full = known // self.pool.block_size
        if full > sequence.num_published:
            keys = extend_keys(sequence, self.pool.block_size)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.block_ids[index], keys[index])
            sequence.num_published = full

    def _let_go(self, sequence: Sequence) -> None:
        """Free a sequence's blocks and pictures; their content stays findable."""
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        for placed in sequence.request.images:
            self._encoder.release(placed.image, sequence.sequence_id)
