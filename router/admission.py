"""How many generations may be inside the server at once."""

from tessera.router.errors import OverloadedError


class Admission:
    """Permits for MAX_CONCURRENT_REQUESTS generations, taken before any work is done for them.

    Nobody waits for a permit: a client that is told "not now" can go elsewhere, one that hangs
    cannot.
    """

    def __init__(self, max_concurrent_requests: int) -> None:
        self._limit = max_concurrent_requests
        self._taken = 0

    @property
    def taken(self) -> int:
        """Permits in use."""
        return self._taken

    def take(self, count: int) -> None:
        """Take `count` permits or none.

        Raises:
            OverloadedError: fewer than that are free.
        """
        if self._taken + count > self._limit:
            raise OverloadedError(
                f"Model is overloaded: {self._taken} of {self._limit} places are taken and "
                f"{count} would be needed. Retry later, or raise MAX_CONCURRENT_REQUESTS."
            )
        self._taken += count

    def give_back(self, count: int) -> None:
        """Return permits taken earlier."""
        self._taken -= count
