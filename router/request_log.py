"""One log line, and one trace, for every HTTP request at its end; for a stream, at the stream's."""

import logging
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.proto.logs import FIELDS
from tessera.router.request_record import RequestRecord, Tracer

logger = logging.getLogger(__name__)

PROBES = frozenset({"/", "/health", "/ping"})
"""Asked every few seconds; that a server is not ready yet is no error then."""


class RequestLog:
    """Keeps the record of each request as `state.record`. Expects `state.request_id`."""

    def __init__(
        self, app: ASGIApp, paths: Collection[str], model_name: str, tracer: Tracer | None
    ) -> None:
        """
        Args:
            paths: the addresses there are, for requests that are refused before the routing.
            tracer: gets what POST requests did; the others only read.
        """
        self._app = app
        self._paths = paths
        self._model_name = model_name
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, method = scope["state"], scope["method"]
        trace = None
        if self._tracer is not None and method == "POST":
            trace = self._tracer.begin(Headers(scope=scope))
        record = RequestRecord(state["request_id"], method, self._model_name, trace)
        state["record"] = record

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except BaseException as error:
            record.failed(error)
            raise
        finally:
            record.ended = time.perf_counter()
            record.route = route_of(scope, self._paths)
            logger.log(_level(record), "request finished", extra={FIELDS: log_fields(record)})
            if record.trace is not None:
                record.trace.end(record)


def route_of(scope: Scope, paths: Collection[str]) -> str:
    """The address as it is declared; empty for one that there is not.

    What clients make up is not repeated. `paths` are the addresses there are, for requests that
    were refused before the routing.
    """
    route, path = scope.get("route"), str(scope["path"])
    if isinstance(route, Route):
        return route.path
    return path if path in paths else ""


def log_fields(record: RequestRecord) -> dict[str, str | int | float]:
    """What the line says; times in seconds. What there was not is left out."""
    fields: dict[str, str | int | float | None] = {
        "request_id": record.request_id,
        "trace_id": record.trace.trace_id if record.trace else None,
        "method": record.method,
        "route": record.route or "none",
        "status": record.status,
        "error_type": record.error_type or None,
        "param": record.param or None,
    }
    if record.generations:
        fields |= _tokens(record)
    fields |= _times(record)
    return {name: value for name, value in fields.items() if value is not None}


def _tokens(record: RequestRecord) -> dict[str, str | int | float | None]:
    prompts = record.prompts
    return {
        "prompt_tokens": sum(stream.prompt_tokens for stream in prompts),
        "image_tokens": sum(stream.image_tokens for stream in prompts),
        "cached_tokens": sum(stream.cached_tokens for stream in prompts),
        "generated_tokens": sum(stream.progress.generated_tokens for stream in record.streams),
        "finish_reason": ",".join(record.finish_reasons) or None,
    }


def _times(record: RequestRecord) -> dict[str, str | int | float | None]:
    """Of several generations, the longest wait and the earliest token."""
    stages = [stage for stage in record.stages.all if stage.parent is None]
    progress = [stream.progress for stream in record.streams]
    waits = [p.started_at - p.submitted_at for p in progress if p.started_at is not None]
    firsts = [p.first_token_at for p in progress if p.first_token_at is not None]
    return {
        "validation_s": round(sum(s.ended - s.began for s in stages), 6) if stages else None,
        "queue_s": round(max(waits), 6) if waits else None,
        "first_token_s": round(min(firsts) - record.began, 6) if firsts else None,
        "total_s": round(record.ended - record.began, 6),
    }


def _level(record: RequestRecord) -> int:
    status = record.status or 0
    if record.method != "POST" and (record.route in PROBES or status < 400):
        return logging.DEBUG
    return logging.ERROR if record.is_our_fault or status >= 500 else logging.INFO
