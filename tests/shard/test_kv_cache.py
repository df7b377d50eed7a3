"""Block tables: places of positions, and tables of different lengths as one."""

from array import array

import pytest

from tessera.shard.kv_cache import SCRATCH_BLOCK, side_by_side, slots


@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("last", range(10))
def test_a_position_lies_in_its_block(first: int, last: int) -> None:
    table = array("i", [7, 3, 5])
    expected = [table[position // 3] * 3 + position % 3 for position in range(first, min(last, 9))]
    assert slots(table, first, min(last, 9), block_size=3).tolist() == expected


def test_positions_beyond_the_table_have_no_place() -> None:
    with pytest.raises(IndexError):
        slots(array("i", [7, 3]), 4, 7, block_size=3)


def test_shorter_tables_end_with_the_scratch_block() -> None:
    tables = [array("i", [4, 2]), array("i", [9]), array("i")]
    cells = side_by_side(tables, 2).tolist()
    assert cells == [4, 2, 9, SCRATCH_BLOCK, SCRATCH_BLOCK, SCRATCH_BLOCK]
