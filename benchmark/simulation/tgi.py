"""A model of text-generation-inference's queue policy (its v3 backend), to compare with.

This is the policy re-told from its published behaviour, not that software, and what the simulator
says of it is not a measurement of that software. Where a detail was in doubt, the reading that
favours it was taken. Modelled:

    queue            strict first in, first out; the first request that does not fit ends the scan
    reservation      blocks for prompt + max_new_tokens, all at once, before the first step
    budget           MAX_BATCH_PREFILL_TOKENS less what the running batch computes next, rounded up
                     to whole blocks; the last request let in may get a first chunk of its prompt
    chunks           after its first chunk the shard divides the budget among unfinished prompts,
                     the oldest first, and leaves one token to every other request
    steps            new requests join the running batch in one mixed step, which is followed by a
                     step of the whole batch before the queue is asked again
    batch size       MAX_BATCH_SIZE bounds the first batch only, as chunking ignores it afterwards
    prefix cache     prompts only, findable when their request has ended; none for models that see
    pictures         encoded when a chunk first reaches them, again for every request
    no lookahead     a step is sent when the tokens of the one before it are back
    clients leaving  noticed at their next token, or when their request would leave the queue

Not modelled: generations above 1,024 tokens being queued again, failures, the cost of merging and
filtering batches on the shard.
"""

from collections import deque
from dataclasses import dataclass

from benchmark.simulation.policy import SimulatedStep
from tessera.router.block_keys import extend_keys
from tessera.router.blocks import BlockPool
from tessera.router.scheduler import SchedulerLimits
from tessera.router.sequence import Sequence

LONGEST_PIECE = 1024
"""Generated tokens that are reserved at once."""


@dataclass(slots=True)
class _Entry:
    """A request in the batch and what its next step computes."""

    sequence: Sequence
    next_tokens: int
    was_sampled: bool = False  # its prompt is computed

    @property
    def prompt_left(self) -> int:
        return self.sequence.num_prompt_tokens - self.sequence.num_computed


class TgiPolicy:
    """First in, first out, with everything reserved up front."""

    num_preemptions = 0
    feature_tokens = 0

    def __init__(
        self, limits: SchedulerLimits, pool: BlockPool, *, prefix_caching: bool = False
    ) -> None:
        self.limits = limits
        self.pool = pool
        self.prefix_caching = prefix_caching
        self._queue: deque[Sequence] = deque()
        self._batch: list[_Entry] = []
        self._gone: set[int] = set()
        self._owes_step = False  # the one that follows a mixed step

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._batch)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._queue.append(sequence)

    def next_step(self) -> SimulatedStep | None:
        """The next call to the shards; called when the one before it has been answered."""
        joined: list[_Entry] = []
        had_batch = bool(self._batch)
        if not self._owes_step:
            joined = self._next_batch()
        self._owes_step = had_batch and bool(joined)
        self._batch += joined
        return self._step(joined) if self._batch else None

    def take_token(self, sequence: Sequence, token_id: int) -> None:
        """Note a token."""
        sequence.token_ids.append(token_id)

    def drop_token(self, sequence: Sequence) -> None:
        """A token that nobody takes is how it is noticed that a client is gone."""
        self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Free a request's blocks; the prompt's full ones can be found from now on."""
        self._gone.discard(sequence.sequence_id)
        self._batch = [entry for entry in self._batch if entry.sequence is not sequence]
        if self.prefix_caching and sequence.num_computed >= sequence.num_prompt_tokens:
            full = sequence.num_prompt_tokens // self.pool.block_size
            keys = extend_keys(sequence, self.pool.block_size)[:full]
            for block, key in zip(sequence.block_ids[:full], keys, strict=True):
                self.pool.publish(block, key)
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []

    def leave(self, sequence: Sequence) -> None:
        """Remember that nobody listens."""
        self._gone.add(sequence.sequence_id)

    def _next_batch(self) -> list[_Entry]:
        """Requests that join now."""
        size = self.pool.block_size
        under_way = sum(entry.next_tokens for entry in self._batch)
        budget = max(0, self.limits.max_step_tokens - under_way)
        budget = -(-budget // size) * size
        joined: list[_Entry] = []
        while self._queue and budget > 0:
            if not self._batch and len(joined) >= self.limits.max_batch_size:
                break
            sequence = self._queue.popleft()
            if sequence.sequence_id in self._gone:
                self._gone.remove(sequence.sequence_id)
                continue
            if not self._reserve(sequence):
                self._queue.appendleft(sequence)
                break
            tokens = min(budget, sequence.num_prompt_tokens - sequence.num_computed)
            joined.append(_Entry(sequence, tokens))
            budget -= tokens
        return joined

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for the prompt and all it may generate, or none."""
        cached = self._match(sequence)
        most = min(sequence.request.stopping.max_new_tokens, LONGEST_PIECE)
        total = self.pool.blocks_for(sequence.num_prompt_tokens + most - 1)
        blocks = self.pool.allocate(total - len(cached))
        if blocks is None:
            self.pool.free(cached)
            return False
        sequence.block_ids = cached + blocks
        sequence.num_computed = sequence.num_cached = len(cached) * self.pool.block_size
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        if not self.prefix_caching:
            return []
        keys = extend_keys(sequence, self.pool.block_size)
        return self.pool.match(keys[: (sequence.num_prompt_tokens - 1) // self.pool.block_size])

    def _step(self, joined: list[_Entry]) -> SimulatedStep:
        step = SimulatedStep(started=[entry.sequence for entry in joined])
        for entry in self._batch:
            self._compute(entry, step)
        self._divide_budget()
        return step

    def _compute(self, entry: _Entry, step: SimulatedStep) -> None:
        sequence = entry.sequence
        if entry.was_sampled:
            sequence.num_computed += 1
            step.work.add_decode(sequence.num_computed)
            step.sampling.append(sequence)
            return
        first = sequence.num_computed
        last = first + entry.next_tokens
        step.work.add_chunk(first, last)
        for placed in sequence.images_between(first, last):
            if placed.offset >= first:  # otherwise an earlier chunk has encoded it
                step.work.add_image(placed.image.num_tiles)
        sequence.num_computed = last
        if last == sequence.num_prompt_tokens:
            entry.was_sampled = True
            step.sampling.append(sequence)

    def _divide_budget(self) -> None:
        """What each request computes in the next step."""
        budget = self.limits.max_step_tokens - (len(self._batch) - 1)
        for entry in self._batch:
            entry.next_tokens = 1
            if entry.prompt_left > 0:
                entry.next_tokens = max(min(entry.prompt_left, budget), 1)
                budget -= entry.next_tokens
