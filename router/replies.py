"""Errors and JSON as HTTP replies, in the shape each API's clients parse."""

from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tessera.router.errors import NotReadyError, OverloadedError, RouterError, ValidationError
from tessera.router.event_stream import to_json

RETRY_AFTER_S = 1
_OPENAI_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class InternalError(RouterError):
    """A defect of this server. What happened is in its log and nowhere else."""

    def __init__(self) -> None:
        super().__init__("Internal error. The server's log has the cause.")


class Json(Response):
    """A JSON reply."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return to_json(content).encode("ascii")


def is_openai_path(path: str) -> bool:
    """Whether errors at this address are told in OpenAI's shape."""
    return path.startswith("/v1/") or path == "/v1"


def native_error(error: RouterError) -> dict[str, Any]:
    """The body text-generation-inference's clients parse."""
    return {"error": str(error), "error_type": error.error_type}


def openai_error(error: RouterError) -> dict[str, Any]:
    """The body OpenAI's clients parse; `error_type` beside it serves the others."""
    client_fault = error.status < 500 and error.status != 424
    fallback = "invalid_request_error" if client_fault else "server_error"
    return {
        "error": {
            "message": str(error),
            "type": _OPENAI_TYPES.get(error.status, fallback),
            "param": error.param if isinstance(error, ValidationError) else None,
            "code": error.error_type,
        },
        "error_type": error.error_type,
    }


class ErrorReply(Json):
    """The reply to a request that failed before its reply began; noted in the request's record."""

    def __init__(self, error: RouterError, body: dict[str, Any], headers: dict[str, str]) -> None:
        super().__init__(body, error.status, headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        scope["state"]["record"].failed(self._error)
        await super().__call__(scope, receive, send)


def error_reply(error: RouterError, path: str) -> Response:
    """The reply to a request that failed before its reply began."""
    body = openai_error(error) if is_openai_path(path) else native_error(error)
    headers = {}
    if isinstance(error, OverloadedError | NotReadyError):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorReply(error, body, headers)
