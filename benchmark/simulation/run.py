"""Replays a trace through a policy on a virtual clock.

The clock is the router's. A step sent to the device starts when the device has done the steps
before it; its tokens are back when it ends, and the router then needs a moment for each of them.
With a lookahead of 1 that moment, and the planning of the next step, passes while the device works
on the step in between.
"""

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from benchmark.simulation.device import Device
from benchmark.simulation.policy import Policy, SimulatedStep
from benchmark.simulation.trace import Arrival
from tessera.router.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RouterCost:
    """Time the router needs, which the device does not see when steps run ahead."""

    per_step_s: float  # plan it and send it
    per_token_s: float  # text, stop rules, the event to the client


@dataclass(slots=True, eq=False)
class Record:
    """What happened to one request. Times in seconds of the virtual clock."""

    arrival: Arrival
    arrived_s: float
    sequence: Sequence
    arrived_step: int  # steps sent before it came
    started_s: float | None = None
    started_step: int = 0
    token_times: list[float] = field(default_factory=list)
    ended_s: float | None = None
    was_refused: bool = False
    has_left: bool = False


@dataclass(slots=True)
class Totals:
    """Sums over the steps of a run."""

    steps: int = 0
    tokens: int = 0
    max_step_tokens: int = 0
    max_running: int = 0
    images: int = 0
    busy_s: float = 0.0
    kv_seconds: float = 0.0  # integral of the used share over the device's busy time
    max_kv_share: float = 0.0
    max_feature_tokens: int = 0
    wasted_tokens: int = 0  # sampled for requests that had ended
    end_s: float = 0.0


@dataclass(slots=True)
class _Sent:
    step: SimulatedStep
    done_s: float


class Simulation:
    """One policy on one device."""

    def __init__(
        self,
        policy: Policy,
        device: Device,
        router: RouterCost,
        *,
        lookahead: int,
        max_concurrent_requests: int,
    ) -> None:
        self.policy = policy
        self.device = device
        self.router = router
        self.lookahead = lookahead
        self.max_concurrent_requests = max_concurrent_requests
        self.records: list[Record] = []
        self.totals = Totals()
        self._now = 0.0
        self._device_free = 0.0
        self._num_inside = 0
        self._order = count()
        self._events: list[tuple[float, int, Arrival | Record]] = []
        self._by_id: dict[int, Record] = {}
        self._followers: dict[Arrival, Arrival] = {}

    def run(self, trace: list[Arrival]) -> list[Record]:
        """Replay `trace` until its last request has ended; returns what became of each."""
        for arrival in trace:
            if arrival.follows is None:
                self._at(arrival.at_s, arrival)
            else:
                self._followers[arrival.follows] = arrival
        under_way: deque[_Sent] = deque()
        while True:
            self._happen_until(self._now)
            while len(under_way) <= self.lookahead and (step := self.policy.next_step()):
                under_way.append(self._send(step))
            if under_way:
                sent = under_way.popleft()
                self._happen_until(sent.done_s)
                self._receive(sent.step)
            elif self._events:
                self._happen_until(self._events[0][0])
            else:
                break
        self.totals.end_s = self._now
        return self.records

    def _at(self, time_s: float, what: Arrival | Record) -> None:
        heappush(self._events, (time_s, next(self._order), what))

    def _happen_until(self, time_s: float) -> None:
        """Let requests come and clients leave up to a time, and go on from there."""
        while self._events and self._events[0][0] <= time_s:
            at, _, what = heappop(self._events)
            if isinstance(what, Record):
                self._lose_patience(what, at)
            else:
                self._arrive(what, at)
        self._now = max(self._now, time_s)

    def _arrive(self, arrival: Arrival, at_s: float) -> None:
        sequence = Sequence(len(self.records) + 1, arrival.request)
        record = Record(arrival, at_s, sequence, self.totals.steps)
        self.records.append(record)
        if self._num_inside >= self.max_concurrent_requests:
            record.was_refused = True
            self._end(record, at_s)
            return
        self._num_inside += 1
        self._by_id[sequence.sequence_id] = record
        self.policy.add(sequence)
        if arrival.patience_s is not None:
            self._at(at_s + arrival.patience_s, record)

    def _lose_patience(self, record: Record, at_s: float) -> None:
        if record.ended_s is None and not record.token_times:
            self._leave(record, at_s)

    def _leave(self, record: Record, at_s: float) -> None:
        record.has_left = True
        self._num_inside -= 1
        self.policy.leave(record.sequence)
        self._end(record, at_s)

    def _end(self, record: Record, at_s: float) -> None:
        record.ended_s = at_s
        if follower := self._followers.pop(record.arrival, None):
            self._at(at_s + follower.at_s, follower)

    def _send(self, step: SimulatedStep) -> _Sent:
        self._happen_until(self._now + self.router.per_step_s)
        for sequence in step.started:
            record = self._by_id[sequence.sequence_id]
            if record.started_s is None:
                record.started_s, record.started_step = self._now, self.totals.steps
        seconds = self.device.step_s(step.work)
        self._device_free = max(self._now, self._device_free) + seconds
        self._count(step, seconds)
        return _Sent(step, self._device_free)

    def _receive(self, step: SimulatedStep) -> None:
        for sequence in step.sampling:
            record = self._by_id[sequence.sequence_id]
            if record.ended_s is not None:
                self.totals.wasted_tokens += 1
                self.policy.drop_token(sequence)
                continue
            token = record.arrival.output_ids[sequence.num_generated]
            self.policy.take_token(sequence, token)
            self._now += self.router.per_token_s
            record.token_times.append(self._now)
            if sequence.num_generated >= len(record.arrival.output_ids):
                self._num_inside -= 1
                self.policy.finish(sequence)
                self._end(record, self._now)
            elif sequence.num_generated >= record.arrival.num_output_tokens:
                self._leave(record, self._now)

    def _count(self, step: SimulatedStep, seconds: float) -> None:
        totals, pool = self.totals, self.policy.pool
        share = 1 - pool.num_free / pool.num_blocks
        totals.steps += 1
        totals.tokens += step.work.tokens
        totals.max_step_tokens = max(totals.max_step_tokens, step.work.tokens)
        totals.max_running = max(totals.max_running, self.policy.num_running)
        totals.images += step.work.images
        totals.busy_s += seconds
        totals.kv_seconds += share * seconds
        totals.max_kv_share = max(totals.max_kv_share, share)
        totals.max_feature_tokens = max(totals.max_feature_tokens, self.policy.feature_tokens)
