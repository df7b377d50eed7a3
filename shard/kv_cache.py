"""Which cache blocks each live sequence owns, as one table on the host.

The router hands out block ids; a shard only remembers them, so that a decode row need not repeat
its whole table in every step.
"""

import numpy as np
from numpy.typing import NDArray

SCRATCH_BLOCK = 0  # never given to a sequence; unused table entries point at it


class BlockTables:
    """A growing [rows, max blocks] table; a sequence holds a row from first to last step."""

    def __init__(self, block_size: int, rows: int = 8, columns: int = 64) -> None:
        self._block_size = block_size
        self._table: NDArray[np.int32] = np.full((rows, columns), SCRATCH_BLOCK, np.int32)
        self._free = list(range(rows - 1, -1, -1))

    def new_row(self) -> int:
        """A row no sequence holds."""
        if not self._free:
            rows = len(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def free_row(self, row: int) -> None:
        """Give a row back."""
        self._table[row] = SCRATCH_BLOCK
        self._free.append(row)

    def append(self, row: int, start: int, block_ids: list[int]) -> None:
        """Write `block_ids` into `row` from column `start` on."""
        end = start + len(block_ids)
        while end > self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._table[row, start:end] = block_ids

    def slot(self, row: int, position: int) -> int:
        """Where the cache keeps a position of the sequence of `row`."""
        column, offset = divmod(position, self._block_size)
        return self._table.item(row, column) * self._block_size + offset

    def slots(self, row: int, first: int, last: int) -> list[int]:
        """The same of the positions [first, last)."""
        columns, offsets = np.divmod(np.arange(first, last), self._block_size)
        blocks = self._table[row, columns].astype(np.int64)
        return (blocks * self._block_size + offsets).tolist()  # type: ignore[no-any-return]

    def select(self, rows: list[int], columns: int) -> NDArray[np.int32]:
        """A copy of the first `columns` blocks of `rows`."""
        return self._table[rows, :columns]
