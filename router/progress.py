"""How far a generation is and when it got there, for its log line and its trace."""

import time
from dataclasses import dataclass, field

from tessera.proto.shard_pb2 import StepReply
from tessera.router.request import FinishReason


@dataclass(slots=True)
class StepTimes:
    """Sums over steps, as rank 0 measured them. A step computes for many requests at once."""

    steps: int = 0
    vision_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0

    def add(self, reply: StepReply) -> None:
        """Count one more step."""
        self.steps += 1
        self.vision_ns += reply.vision_ns
        self.forward_ns += reply.forward_ns
        self.sample_ns += reply.sample_ns


@dataclass(slots=True)
class Progress:
    """Of one generation. Times are `time.perf_counter()`; None: it has not come to that."""

    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None  # the first step that computes something for it was sent
    first_token_at: float | None = None
    last_token_at: float | None = None
    generated_tokens: int = 0
    finish_reason: FinishReason | None = None
    preempted_at: list[float] = field(default_factory=list)
    is_traced: bool = False  # whether the times of its steps are wanted
    prefill: StepTimes = field(default_factory=StepTimes)  # steps up to the first token
    decode: StepTimes = field(default_factory=StepTimes)  # those after it, what is redone included

    def step_done(self, reply: StepReply) -> None:
        """Count a step that computed something for it, before its token is taken."""
        (self.prefill if self.first_token_at is None else self.decode).add(reply)
