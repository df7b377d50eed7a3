"""How long a request may wait to be let in (MAX_QUEUE_TIME). No timer of its own: it is asked."""

from collections import deque
from collections.abc import Callable


class QueueTime:
    """Deadlines of sequences that were queued, in order: all may wait equally long.

    A sequence's deadline is kept until it is over, whatever became of it, so that nothing has to be
    searched for; asking costs as much as there are new answers.
    """

    def __init__(self, max_queue_time_s: float | None, clock: Callable[[], float]) -> None:
        """
        Args:
            max_queue_time_s: above 0; None: any time.
            clock: seconds that never go back.
        """
        self.max_queue_time_s = max_queue_time_s
        self._clock = clock
        self._deadlines: deque[tuple[float, int]] = deque()

    def add(self, sequence_id: int) -> None:
        """Note that a sequence was queued now."""
        if self.max_queue_time_s is not None:
            self._deadlines.append((self._clock() + self.max_queue_time_s, sequence_id))

    def take_overdue(self) -> list[int]:
        """The sequences whose deadline has come since the last call, waiting still or not."""
        overdue = []
        now = self._clock() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now:
            overdue.append(self._deadlines.popleft()[1])
        return overdue

    def until_next_s(self) -> float | None:
        """Seconds until the next deadline, 0 or more; None if there is none."""
        return max(0.0, self._deadlines[0][0] - self._clock()) if self._deadlines else None
