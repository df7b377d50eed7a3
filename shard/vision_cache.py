"""Image features by content hash, from the step that encodes them until the router lets go."""

from torch import Tensor


class VisionCache:
    """A plain store; the router decides what stays."""

    def __init__(self) -> None:
        self._features: dict[bytes, Tensor] = {}

    def __contains__(self, content_hash: bytes) -> bool:
        return content_hash in self._features

    def put(self, content_hash: bytes, features_TD: Tensor) -> None:
        """Keep one picture's features, [tokens, D]."""
        self._features[content_hash] = features_TD

    def get(self, content_hash: bytes) -> Tensor | None:
        """One picture's features, or None when they are not here."""
        return self._features.get(content_hash)

    def release(self, content_hash: bytes) -> None:
        """Forget one picture; harmless when unknown."""
        self._features.pop(content_hash, None)

    def clear(self) -> None:
        """Forget everything."""
        self._features.clear()
