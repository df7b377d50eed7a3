"""How many ranks can share the attention heads of a model."""


def shareable(num_heads: int, num_kv_heads: int, world_size: int) -> bool:
    """Whether every rank gets as many query heads, with key/value heads shared or held by several.

    Args:
        num_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads.
        world_size: ranks.
    """
    kv_works = num_kv_heads % world_size == 0 or world_size % num_kv_heads == 0
    return num_heads % world_size == 0 and kv_works


def possible_ranks(num_heads: int, num_kv_heads: int) -> str:
    """The numbers of ranks that work, for messages."""
    works = (n for n in range(1, num_heads + 1) if shareable(num_heads, num_kv_heads, n))
    return ", ".join(map(str, works))
