"""Where a sequence's keys and values lie in the cache: its block table, ids in order.

The router hands out block ids; a shard only remembers them, so that a decode row need not repeat
its whole table in every step.
"""

from array import array
from collections.abc import Sequence

SCRATCH_BLOCK = 0  # never given to a sequence; what is past a sequence's end points at it


def slots(table: "array[int]", first: int, last: int, block_size: int) -> "array[int]":
    """Where the positions [first, last) are kept: block * block_size + offset, 64 bits each.

    Raises:
        IndexError: the table ends before them.
    """
    found = array("q")
    position = first
    while position < last:
        column, offset = divmod(position, block_size)
        count = min(block_size - offset, last - position)
        slot = table[column] * block_size + offset
        found.extend(range(slot, slot + count))
        position += count
    return found


def side_by_side(tables: Sequence["array[int]"], columns: int) -> "array[int]":
    """The tables as rows of `columns` ids, the longest of them at most, one after the other."""
    cells = array("i")
    for table in tables:
        cells.extend(table)
        cells.extend(array("i", [SCRATCH_BLOCK]) * (columns - len(table)))
    return cells
