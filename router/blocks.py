"""The pool of KV-cache blocks. The shards own the memory; the router owns the map."""


class BlockPool:
    """Hands out block ids 1..num_blocks. Block 0 is the shards' scratch and never leaves them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks, 0, -1))

    @property
    def num_free(self) -> int:
        """Blocks no sequence holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None (and no change) when fewer are free."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        taken.reverse()
        return taken

    def free(self, block_ids: list[int]) -> None:
        """Take blocks back. Raises ValueError for a block that is not handed out."""
        if len(self._free) + len(block_ids) > self.num_blocks:
            raise ValueError("a block came back twice")
        self._free.extend(reversed(block_ids))
