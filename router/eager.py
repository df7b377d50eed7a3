"""Work that seldom has to wait, begun without the cost of a task."""

from collections.abc import Awaitable, Generator
from types import coroutine
from typing import Any


def begin(work: Awaitable[None]) -> Awaitable[None] | None:
    """Do work at once, on the event loop, up to where it has to wait.

    Returns:
        Its rest, to be awaited; None: it is done.

    Raises:
        Exception: what the work raises.
    """
    steps = work.__await__()
    try:
        awaited = next(steps)
    except StopIteration:
        return None
    return _rest(awaited, steps)


@coroutine
def _rest(awaited: Any, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    """`awaited`: what the work waits for; whoever awaits the rest waits for it, too."""
    try:
        yield awaited
        yield from steps
    finally:
        steps.close()  # also where waiting was cancelled
