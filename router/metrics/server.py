"""The server itself: what it is, and how it answers HTTP."""

import platform

from tessera.router.metrics.instruments import Registry

_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
OTHER = "other"
"""The label of methods and addresses that do not exist: clients must not make up labels."""


class ServerMetrics:
    """Build, model and replies."""

    def __init__(self, registry: Registry) -> None:
        self._build = registry.gauges(
            "tessera_build_info", "1; the software", "version", "python_version"
        )
        self._model = registry.gauges("tessera_model_info", "1; the model", "model", "revision")
        self._replies = registry.counters(
            "tessera_http_requests_total",
            "HTTP requests by route and status, counted when the reply begins; "
            "499: the client left before",
            "method",
            "route",
            "status",
            like="http.server.request.duration (count)",
        )

    def describe(self, version: str, model: str, revision: str | None) -> None:
        """What is served, by which version."""
        self._build.of(version, platform.python_version()).set(1)
        self._model.of(model, revision or "").set(1)

    def replied(self, method: str, route: str, status: int) -> None:
        """A reply begins. `route`: its pattern, not what a client wrote."""
        method = method if method in _METHODS else OTHER
        self._replies.of(method, route, str(status)).increase()
