"""The queue in front of the batch: by priority, fair between keys, first come first served in both.

Fairness is start-time fair queuing (Goyal, Vin and Cheng 1996): each key's requests are spaced on a
virtual clock by what they cost, so a key that sends a thousand requests delays only itself.
"""

from bisect import insort
from collections.abc import Iterator
from itertools import count

from tessera.router.sequence import Sequence

MAX_IDLE_KEYS = 1024
"""Keys without a waiting request that are remembered; then the half that owes least is dropped."""


class WaitingQueue:
    """Sequences that wait for their first step, and preempted ones, which come before them."""

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[float, float, int], Sequence]] = []
        self._arrivals = count()
        self._returns = count(-1, -1)
        self._virtual_time = 0.0
        self._next_start: dict[str, float] = {}  # per key, where its next request begins

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, sequence in self._entries)

    def append(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        request = sequence.request
        start = max(self._virtual_time, self._next_start.get(request.fairness_key, 0.0))
        self._next_start[request.fairness_key] = start + _cost(sequence)
        place = (-float(request.priority), start, next(self._arrivals))
        insort(self._entries, (place, sequence), key=lambda entry: entry[0])

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before everybody else."""
        place = (float("-inf"), 0.0, next(self._returns))
        self._entries.insert(0, (place, sequence))

    def let_in(self, sequence: Sequence) -> None:
        """Take out a sequence that is here and has its turn; the virtual clock goes on to it."""
        start = self._take(sequence)
        assert start is not None
        self._virtual_time = max(self._virtual_time, start)
        self._drop_idle_keys()

    def remove(self, sequence: Sequence) -> bool:
        """Take out a sequence that does not wait any longer; False if it is not here."""
        is_here = self._take(sequence) is not None
        self._drop_idle_keys()
        return is_here

    def _take(self, sequence: Sequence) -> float | None:
        """Where on the virtual clock it began, or None."""
        for index, ((_, start, _), entry) in enumerate(self._entries):
            if entry is sequence:
                del self._entries[index]
                return start
        return None

    def _drop_idle_keys(self) -> None:
        """A key whose requests are all past needs no memory; bounds the table."""
        if not self._entries:
            self._next_start.clear()
            self._virtual_time = 0.0
        elif len(self._next_start) > len(self._entries) + MAX_IDLE_KEYS:
            waiting = {sequence.request.fairness_key for sequence in self}
            idle = sorted(self._next_start.keys() - waiting, key=self._next_start.__getitem__)
            for key in idle[: -MAX_IDLE_KEYS // 2]:
                del self._next_start[key]


def _cost(sequence: Sequence) -> float:
    """What a sequence takes of the server: tokens to compute and to generate."""
    return float(sequence.num_prompt_tokens + sequence.request.stopping.max_new_tokens)
