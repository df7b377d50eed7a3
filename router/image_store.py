"""Which pictures' features the shards hold, for whom, and which stay for the next request."""

from collections import OrderedDict
from collections.abc import Iterable

from tessera.router.request import PreparedImage


class ImageStore:
    """Features live on the shards while a sequence needs them, and after that as long as they fit.

    The bound counts prompt tokens, one feature each. Pictures nobody needs at the moment make room
    first, the least recently needed before the others.
    """

    def __init__(self, max_tokens: int = 0) -> None:
        self._max_tokens = max_tokens
        self._needed_by: dict[bytes, set[int]] = {}
        self._encoded: dict[bytes, int] = {}  # content hash -> tokens
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._encoded_tokens = 0
        self._idle_tokens = 0
        self._released: list[bytes] = []

    @property
    def encoded_tokens(self) -> int:
        """Features the shards hold."""
        return self._encoded_tokens

    def has_room_for(self, image: PreparedImage) -> bool:
        """Whether its features fit beside those that are needed."""
        needed = self._encoded_tokens - self._idle_tokens
        return needed + image.num_tokens <= self._max_tokens

    def need(self, sequence_id: int, images: Iterable[PreparedImage]) -> None:
        """Note that a sequence will read these pictures' features."""
        for image in images:
            self._needed_by.setdefault(image.content_hash, set()).add(sequence_id)
            if image.content_hash in self._idle:
                del self._idle[image.content_hash]
                self._idle_tokens -= self._encoded[image.content_hash]

    def is_encoded(self, image: PreparedImage) -> bool:
        """Whether the shards hold its features, or will after the step being planned."""
        return image.content_hash in self._encoded

    def mark_encoded(self, image: PreparedImage) -> None:
        """Note that the step being planned encodes it."""
        self._encoded[image.content_hash] = image.num_tokens
        self._encoded_tokens += image.num_tokens
        self._drop_idle()

    def done(self, sequence_id: int, images: Iterable[PreparedImage]) -> None:
        """Note that a sequence needs these no longer."""
        for image in images:
            users = self._needed_by.get(image.content_hash)
            if users is None:
                continue
            users.discard(sequence_id)
            if not users:
                del self._needed_by[image.content_hash]
                self._let_rest(image.content_hash)

    def take_released(self) -> list[bytes]:
        """Hashes to release on the shards, each told once."""
        released, self._released = self._released, []
        return released

    def _let_rest(self, content_hash: bytes) -> None:
        if content_hash in self._encoded:
            self._idle[content_hash] = None
            self._idle_tokens += self._encoded[content_hash]
            self._drop_idle()

    def _drop_idle(self) -> None:
        while self._idle and self._encoded_tokens > self._max_tokens:
            oldest, _ = self._idle.popitem(last=False)
            tokens = self._encoded.pop(oldest)
            self._idle_tokens -= tokens
            self._encoded_tokens -= tokens
            self._released.append(oldest)
