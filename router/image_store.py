"""Which pictures' features the shards hold, and for whom."""

from collections.abc import Iterable

from tessera.router.request import PreparedImage


class ImageStore:
    """Features live on the shards from the step that encodes them until no sequence needs them."""

    def __init__(self) -> None:
        self._needed_by: dict[bytes, set[int]] = {}
        self._encoded: set[bytes] = set()
        self._released: list[bytes] = []

    def need(self, sequence_id: int, images: Iterable[PreparedImage]) -> None:
        """Note that a sequence will read these pictures' features."""
        for image in images:
            self._needed_by.setdefault(image.content_hash, set()).add(sequence_id)

    def is_encoded(self, image: PreparedImage) -> bool:
        """Whether the shards hold its features, or will after the step being planned."""
        return image.content_hash in self._encoded

    def mark_encoded(self, image: PreparedImage) -> None:
        """Note that the step being planned encodes it."""
        self._encoded.add(image.content_hash)

    def done(self, sequence_id: int, images: Iterable[PreparedImage]) -> None:
        """Note that a sequence needs these no longer; the last one to say so frees the features."""
        for image in images:
            users = self._needed_by.get(image.content_hash)
            if users is None:
                continue
            users.discard(sequence_id)
            if not users:
                del self._needed_by[image.content_hash]
                if image.content_hash in self._encoded:
                    self._encoded.discard(image.content_hash)
                    self._released.append(image.content_hash)

    def take_released(self) -> list[bytes]:
        """Hashes to release on the shards, each told once."""
        released, self._released = self._released, []
        return released
