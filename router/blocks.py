"""The pool of KV-cache blocks. The shards own the memory; the router owns the map.

A full block can be found by its content (`block_keys`), whoever computed it: running sequences
share it at once, and it stays findable after they end, until its memory is needed. Blocks that
nobody holds are reused in the order in which they were let go, those without content first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


class BlockPool:
    """Hands out block ids 1..num_blocks. Block 0 is the shards' scratch and never leaves them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks, 0, -1))  # nobody holds them and nobody can find them
        self._kept: OrderedDict[int, None] = OrderedDict()  # nobody holds them, least recent first
        self._holders: dict[int, int] = {}  # block -> sequences that hold it
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks no sequence holds, whether their content is kept or not."""
        return len(self._blank) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks no sequence holds whose content can still be found."""
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks to write to, or None (and no change) when fewer are free."""
        if count > self.num_free:
            return None
        taken = [self._blank.pop() if self._blank else self._forget_oldest() for _ in range(count)]
        self._holders |= dict.fromkeys(taken, 1)
        return taken

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the blocks of the longest findable run of `keys`, from the first on."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            found.append(block)
        return found

    def count_findable(self, keys: Iterable[bytes]) -> int:
        """How many blocks `match` would hold."""
        return sum(1 for _ in takewhile(self._block_of.__contains__, keys))

    def publish(self, block_id: int, key: bytes) -> None:
        """Make a held, full block findable. A twin that is findable already stays the one."""
        if key not in self._block_of and block_id not in self._key_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make blocks unfindable, because their content is not to be trusted."""
        for block in block_ids:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
            if block in self._kept:
                del self._kept[block]
                self._blank.append(block)

    def free(self, block_ids: Sequence[int]) -> None:
        """Let blocks go. Raises ValueError for a block that nobody holds."""
        for block in reversed(block_ids):  # the end of a prefix is of use to fewer than its start
            holders = self._holders.pop(block, 0) - 1
            if holders < 0:
                raise ValueError(f"block {block} came back twice")
            if holders:
                self._holders[block] = holders
            elif block in self._key_of:
                self._kept[block] = None
            else:
                self._blank.append(block)

    def _forget_oldest(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
