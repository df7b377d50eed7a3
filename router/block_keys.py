"""Content addresses of full KV-cache blocks.

A block's key is a hash of everything its keys and values depend on: the key of the block before it,
its token ids, and, since all pictures share one placeholder id, the content hash of the picture
behind each placeholder with the place in it. A salt keeps tenants apart.
"""

from array import array
from hashlib import blake2b

from tessera.router.sequence import Sequence

KEY_BYTES = 16


def first_key(salt: str) -> bytes:
    """What the key of a sequence's first block is chained to."""
    return blake2b(salt.encode(), digest_size=KEY_BYTES).digest()


def extend_keys(sequence: Sequence, block_size: int) -> list[bytes]:
    """The keys of all full blocks of a sequence's known tokens; remembered in the sequence."""
    keys = sequence.block_keys
    for index in range(len(keys), len(sequence.token_ids) // block_size):
        parent = keys[-1] if keys else first_key(sequence.request.cache_salt)
        keys.append(_block_key(sequence, parent, index * block_size, block_size))
    return keys


def _block_key(sequence: Sequence, parent: bytes, first: int, block_size: int) -> bytes:
    last = first + block_size
    digest = blake2b(parent, digest_size=KEY_BYTES)
    digest.update(array("I", sequence.token_ids[first:last]).tobytes())
    for placed in sequence.images_between(first, last):
        digest.update(placed.image.content_hash)
        digest.update((placed.offset - first).to_bytes(8, "little", signed=True))
    return digest.digest()
