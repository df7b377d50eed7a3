"""What happens around every route: ids, the key, the size of bodies, and the last resort."""

import hmac
import logging
import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.router.docs import PATHS as DOCS_PATHS
from tessera.router.errors import PayloadTooLarge, Unauthorized, UnsupportedBody
from tessera.router.metrics.server import OTHER, ServerMetrics
from tessera.router.playground import PATHS as PLAYGROUND_PATHS
from tessera.router.replies import InternalError, error_reply
from tessera.router.request_log import route_of

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
CLIENT_LEFT = 499
"""Counted where a client left before its reply began; nginx calls it so."""

OPEN_PATHS = frozenset({"/", "/health", "/ping"}) | PLAYGROUND_PATHS | DOCS_PATHS
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class RequestIds:
    """Every reply carries `x-request-id`: the client's own where it is harmless, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID_FORM.match(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ReplyCounter:
    """Counts every reply once, by route and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, paths: Collection[str]) -> None:
        """`paths`: the addresses there are, for replies that are given before the routing."""
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def counting_send(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._count(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        finally:
            if not has_begun:
                self._count(scope, CLIENT_LEFT)

    def _count(self, scope: Scope, status: int) -> None:
        route = route_of(scope, self._paths) or OTHER
        self._metrics.replied(scope["method"], route, status)


class LastResort:
    """An exception nobody expected: logged in full, told to the client as 500 without detail."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            pass  # there is nobody to tell
        except Exception:
            request_id = scope["state"]["request_id"]
            logger.exception("request %s failed unexpectedly", request_id)
            if begun:
                raise  # the server cuts the connection, so that the reply cannot look complete
            await error_reply(InternalError(), scope["path"])(scope, receive, send)


class ApiKey:
    """Refuses requests without the key, before their body is read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or _is_open(scope) or self._is_valid(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized(
            "This server needs a key: send the header authorization: Bearer <key>."
        )
        await error_reply(error, scope["path"])(scope, receive, send)

    def _is_valid(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        # In constant time: how long it takes must not tell how much of a guess was right.
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def _is_open(scope: Scope) -> bool:
    """Probes need no key, nor do the page that asks for it and the API's description."""
    return scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS


class BodyLimit:
    """Bounds what is read of a body, and refuses compressed ones."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            error = UnsupportedBody("compressed bodies are not read; send it as it is.")
            await error_reply(error, scope["path"])(scope, receive, send)
            return
        if _declared_bytes(headers) > self._max_bytes:
            await error_reply(self._too_large(), scope["path"])(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """`receive`, for bodies whose length is not declared."""
        num_bytes = 0

        async def counting_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise self._too_large()
            return message

        return counting_receive

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body is larger than the {self._max_bytes} bytes this server reads. "
            "Send smaller pictures, or raise PAYLOAD_LIMIT."
        )


def _declared_bytes(headers: Headers) -> int:
    """Content-Length; 0 where there is none, then `receive` is counted."""
    digits = headers.get("content-length", "")
    return int(digits[:20]) if digits.isascii() and digits.isdigit() else 0
