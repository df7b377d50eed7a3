"""The ASGI application: every dependency comes in here, none from a module global."""

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tessera.router.admission import Admission
from tessera.router.docs import docs_routes
from tessera.router.errors import MethodNotAllowed, NotFound, RouterError
from tessera.router.generation import Generator
from tessera.router.metrics import Metrics
from tessera.router.middleware import (
    REQUEST_ID,
    ApiKey,
    BodyLimit,
    LastResort,
    ReplyCounter,
    RequestIds,
)
from tessera.router.model_files import ModelFiles
from tessera.router.native_api import NativeApi
from tessera.router.notices import HEADER as WARNINGS
from tessera.router.openai_api import OpenAIApi
from tessera.router.platform_api import PlatformApi
from tessera.router.playground import playground_routes
from tessera.router.replies import InternalError, error_reply, is_openai_path
from tessera.router.request_log import RequestLog
from tessera.router.request_record import Tracer
from tessera.router.server_info import ServerInfo
from tessera.router.settings import RouterSettings
from tessera.router.ticket import Desk
from tessera.router.validation import Validator

logger = logging.getLogger(__name__)


def create_app(
    settings: RouterSettings,
    generator: Generator,
    validator: Validator,
    files: ModelFiles,
    metrics: Metrics,
    tracer: Tracer | None = None,
) -> Starlette:
    """Both APIs over one generator.

    `tracer` is told of every request that asks for something.

    It can serve before the model is ready: until `generator.ready` is true, /health and everything
    that generates answer 503.
    """
    desk = Desk(generator, Admission(settings.max_concurrent_requests), metrics)
    info = ServerInfo(
        settings=settings,
        model_name=_model_name(settings, files),
        model_sha=files.sha,
        pipeline_tag=files.pipeline_tag,
        version=version("tessera"),
        started_at=int(time.time()),
    )
    metrics.server.describe(info.version, info.model_name, info.model_sha)
    native = NativeApi(generator, validator, desk, metrics, info)
    openai = OpenAIApi(generator, validator, desk, info)
    platforms = PlatformApi(native, openai)
    docs = docs_routes(info.version)
    page = playground_routes(settings.payload_limit) if settings.playground else []
    routes = [*native.routes(), *openai.routes(), *platforms.routes(), *docs, *page]
    app = Starlette(
        routes=routes,
        exception_handlers={
            RouterError: _on_router_error,
            HTTPException: _on_http_exception,
        },
        middleware=_middleware(settings, metrics, routes, info.model_name, tracer),
    )
    app.router.redirect_slashes = False  # an unknown address is a 404, not a redirect
    return app


def _model_name(settings: RouterSettings, files: ModelFiles) -> str:
    """What replies call the model: never the path of a folder."""
    if settings.served_model_name:
        return settings.served_model_name
    is_hub_id = settings.model_id and not Path(settings.model_id).exists()
    return settings.model_id if is_hub_id else files.folder.absolute().name


def _middleware(
    settings: RouterSettings,
    metrics: Metrics,
    routes: Sequence[Route],
    model_name: str,
    tracer: Tracer | None,
) -> list[Middleware]:
    """From the outside in."""
    paths = frozenset(route.path for route in routes)
    layers = [
        Middleware(ReplyCounter, metrics=metrics.server, paths=paths),
        Middleware(RequestIds),
        Middleware(RequestLog, paths=paths, model_name=model_name, tracer=tracer),
        Middleware(LastResort),
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origin or ("*",),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients send headers of their own, like x-stainless-os
            allow_credentials=False,  # any page a user opens may call; it must not borrow cookies
            expose_headers=(REQUEST_ID, "retry-after", WARNINGS),
        ),
    ]
    if settings.api_key:
        layers.append(Middleware(ApiKey, key=settings.api_key))
    return [*layers, Middleware(BodyLimit, max_bytes=settings.payload_limit)]


async def _on_router_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RouterError)  # registered for nothing else
    if error.status == 500:
        logger.error("request %s: %s", request.state.request_id, error)
    return error_reply(error, _path(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, in our shape."""
    assert isinstance(error, HTTPException)  # registered for nothing else
    ours: RouterError
    if error.status_code == 404:
        ours = NotFound(_what_exists(request))
    elif error.status_code == 405:
        ours = MethodNotAllowed("This address does not take that method.")
    else:
        ours = InternalError()
    reply = error_reply(ours, _path(request))
    reply.headers.update(error.headers or {})
    return reply


def _what_exists(request: Request) -> str:
    """What to say about an address that leads nowhere; OpenAI's API has many that are not here."""
    sentence = "There is nothing at this address."
    if not is_openai_path(_path(request)):
        return sentence
    ours = [r for r in request.app.routes if isinstance(r, Route) and is_openai_path(r.path)]
    listed = ", ".join(f"{_method(route)} {route.path.replace(':path', '')}" for route in ours)
    return f"{sentence} Of OpenAI's API, this server has {listed}."


def _method(route: Route) -> str:
    return "POST" if "POST" in (route.methods or ()) else "GET"


def _path(request: Request) -> str:
    """The path as it was routed; `request.url` would let the Host header have a say."""
    return str(request.scope["path"])
