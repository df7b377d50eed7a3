"""What the pictures of one request may still cost: one value shared by all its prompts."""

import asyncio
from dataclasses import dataclass, field

from tessera.router.errors import ValidationError
from tessera.router.request_record import Stages
from tessera.router.settings import RouterSettings

CONCURRENT_FETCHES = 4
"""Pictures of one request that are fetched at once."""


@dataclass(slots=True, eq=False)
class PictureAllowance:
    """Counts down as pictures are read and decoded. Used on the event loop only."""

    settings: RouterSettings
    stages: Stages = field(default_factory=Stages)  # where the time it takes is noted
    num_bytes: int = field(init=False)  # that may still be fetched by URL or read by path
    pixels: int = field(init=False)  # that may still be decoded
    fetched: dict[str, bytes] = field(default_factory=dict, repr=False)  # by URL as it was written
    fetching: asyncio.Semaphore = field(init=False)
    _deadline: float | None = None

    def __post_init__(self) -> None:
        self.num_bytes = self.settings.max_image_fetch_size
        self.pixels = self.settings.max_request_pixels
        self.fetching = asyncio.Semaphore(CONCURRENT_FETCHES)

    @property
    def fetch_deadline(self) -> float:
        """When the request's fetches must be through, on the event loop's clock.

        The time begins with the first of them.
        """
        if self._deadline is None:
            now = asyncio.get_running_loop().time()
            self._deadline = now + self.settings.image_fetch_timeout
        return self._deadline

    def take_bytes(self, count: int) -> None:
        """Count bytes of pictures that came from elsewhere than the request's body.

        Raises:
            ValidationError: they are more than is left.
        """
        self.num_bytes -= count
        if self.num_bytes < 0:
            raise ValidationError(
                "the pictures that this request has read by URL or path are larger than "
                f"{self.settings.max_image_fetch_size} bytes together (MAX_IMAGE_FETCH_SIZE)"
            )

    def take_pixels(self, count: int) -> None:
        """Count pixels, before they are decoded.

        Raises:
            ValidationError: they are more than is left.
        """
        self.pixels -= count
        if self.pixels < 0:
            limit = self.settings.max_request_pixels
            raise ValidationError(
                f"the request's pictures have {limit - self.pixels} pixels together, over the "
                f"limit of {limit} (MAX_REQUEST_PIXELS); send fewer or smaller ones"
            )
