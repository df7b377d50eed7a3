"""Keeps what goes wrong in a step with the one it belongs to.

Work that runs out of memory is cut in halves and tried again; work that fails otherwise is tried
piece by piece, so that only the piece at fault is lost. Work with collectives in it must be done by
`Group.together`, so that every rank sees the same failures and repeats the same parts. What ends
the group is let pass.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from tessera.shard.errors import GroupLost, is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def in_halves(work: Callable[[int, int], R], first: int, last: int) -> list[R]:
    """`[work(first, last)]`, or the results of its parts where it runs out of memory.

    Raises:
        Exception: what `work` raises for a single item, or for another reason.
    """
    try:
        return [work(first, last)]
    except Exception as error:
        if not is_out_of_memory(error) or last - first < 2:
            raise
        logger.warning("out of memory for %d items at once; trying half", last - first)
    middle = (first + last) // 2
    return in_halves(work, first, middle) + in_halves(work, middle, last)


def part_of(tensor: Tensor, first: int, last: int) -> Tensor:
    """The rows [first, last); the tensor itself where that is all, as it nearly always is."""
    return tensor if last - first == tensor.shape[0] else tensor[first:last]


def one_by_one(work: Callable[[T], R], items: Sequence[T]) -> list[R | str]:
    """The result of each item, or why it failed, in words for its client."""
    results: list[R | str] = []
    for item in items:
        try:
            results.append(work(item))
        except GroupLost:
            raise
        except Exception as error:
            logger.exception("one part of a step failed")
            results.append(describe(error))
    return results


def describe(error: Exception) -> str:
    """A reason that is safe to show to a client."""
    if is_out_of_memory(error):
        return "the device ran out of memory; lower MAX_BATCH_PREFILL_TOKENS"
    return "an internal error in the shard; see its log"
