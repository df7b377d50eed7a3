"""Which tokens guided sequences may sample: they come after their step and are waited for."""

import threading
from collections.abc import Collection, Mapping

MASK_TIMEOUT_S = 30.0
"""Far more than the router needs; one that hangs for good is found by other means."""


class TokenMaskBox:
    """Filled by the thread that reads the stream, emptied by the one that owns the device."""

    def __init__(self, timeout_s: float = MASK_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._masks: dict[int, dict[int, bytes]] = {}  # by step id, then by sequence id
        self._taken = -1  # the last step that took its own
        self._is_closed = False

    def put(self, step_id: int, masks: Mapping[int, bytes]) -> None:
        """Some masks of a step, by sequence id; those of steps that are over are dropped."""
        with self._changed:
            if step_id > self._taken:
                self._masks.setdefault(step_id, {}).update(masks)
                self._changed.notify_all()

    def take(self, step_id: int, sequence_ids: Collection[int]) -> dict[int, bytes]:
        """The masks of these sequences; without those that do not come in time, or any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._has(step_id, sequence_ids), self._timeout_s
            )
            self._taken = step_id
            found = self._masks.get(step_id, {})
            self._masks = {later: m for later, m in self._masks.items() if later > step_id}
            return found

    def close(self) -> None:
        """No more will come: whoever waits goes on without."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def reset(self) -> None:
        """Forget everything, for a new stream."""
        with self._changed:
            self._masks, self._taken, self._is_closed = {}, -1, False

    def _has(self, step_id: int, sequence_ids: Collection[int]) -> bool:
        return self._masks.get(step_id, {}).keys() >= set(sequence_ids)
