"""What the simulation drives: a policy that decides which tokens a step computes."""

from dataclasses import dataclass, field
from typing import Protocol

from benchmark.simulation.device import Work
from tessera.router.blocks import BlockPool
from tessera.router.scheduler import Scheduler, SchedulerLimits, StepPlan
from tessera.router.sequence import Sequence


@dataclass(slots=True)
class SimulatedStep:
    """One step: what the device does, who takes part, who gets a token."""

    work: Work = field(default_factory=Work)
    started: list[Sequence] = field(default_factory=list)  # those computed after a wait
    sampling: list[Sequence] = field(default_factory=list)


class Policy(Protocol):
    """A scheduler as the simulation sees it."""

    pool: BlockPool

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""

    @property
    def num_preemptions(self) -> int:
        """Sequences put back to the queue so far."""

    @property
    def feature_tokens(self) -> int:
        """Features of pictures the device holds."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""

    def next_step(self) -> SimulatedStep | None:
        """The next step, or None when there is nothing to do before tokens come back."""

    def take_token(self, sequence: Sequence, token_id: int) -> None:
        """Note the token a step sampled for a sequence that goes on or ends with it."""

    def drop_token(self, sequence: Sequence) -> None:
        """Note that a token came for a sequence that has ended or whose client has left."""

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence's client is gone."""


class TesseraPolicy:
    """The real scheduler of the router."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.pool = pool
        self.scheduler = Scheduler(limits, pool)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self.scheduler.running)

    @property
    def num_preemptions(self) -> int:
        """Sequences put back to the queue so far."""
        return self.scheduler.counts.preemptions

    @property
    def feature_tokens(self) -> int:
        """Features of pictures the device holds."""
        return self.scheduler.images.encoded_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.add(sequence)

    def next_step(self) -> SimulatedStep | None:
        """What the router would send next."""
        plan = self.scheduler.next_step()
        return None if plan.is_empty else _step_of(plan)

    def take_token(self, sequence: Sequence, token_id: int) -> None:
        """Note a token."""
        self.scheduler.append_token(sequence, token_id)

    def drop_token(self, sequence: Sequence) -> None:
        """The scheduler has forgotten the sequence; nothing to do."""

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self.scheduler.finish(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The router cancels at once."""
        self.scheduler.finish(sequence)


def _step_of(plan: StepPlan) -> SimulatedStep:
    step = SimulatedStep()
    for row in plan.decodes:
        step.work.add_decode(row.context_len)
        step.sampling.append(row.sequence)
    for chunk in plan.chunks:
        step.work.add_chunk(chunk.first, chunk.last)
        if chunk.is_start:
            step.started.append(chunk.sequence)
        if chunk.is_last:
            step.sampling.append(chunk.sequence)
    for image in plan.images:
        step.work.add_image(image.num_tiles)
    return step
