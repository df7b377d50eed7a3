"""What pictures cost before they reach the shards."""

from tessera.router.metrics import buckets
from tessera.router.metrics.instruments import Registry


class PictureMetrics:
    """Numbers about single pictures."""

    def __init__(self, registry: Registry) -> None:
        self._fetch = registry.histogram(
            "tessera_image_fetch_seconds",
            "Fetching one picture by URL, with or without success, waiting for its turn included",
            buckets.WORK_S,
        )
        self._decode = registry.histogram(
            "tessera_image_decode_seconds",
            "Decoding one picture and cutting it into tiles; twice where it had to be reduced",
            buckets.WORK_S,
        )

    def fetched(self, seconds: float) -> None:
        """A fetch has ended."""
        self._fetch.observe(seconds)

    def decoded(self, seconds: float) -> None:
        """A picture was decoded."""
        self._decode.observe(seconds)
