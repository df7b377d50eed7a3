"""The page at /ui, a chat about pictures in the browser: static files, all power is in the API."""

from pathlib import Path
from string import Template

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "ui"
PAGE = "/ui"
_FILES = {
    PAGE: ("index.html", "text/html; charset=utf-8"),
    f"{PAGE}/style.css": ("style.css", "text/css; charset=utf-8"),
    f"{PAGE}/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"{PAGE}/{name}": (name, "text/javascript; charset=utf-8")
        for name in ("page.js", "api.js", "turns.js", "pictures.js")
    },
}
PATHS = frozenset(_FILES) | {f"{PAGE}/"}
"""Every address of the page. They need no key: there is nothing of the model's in them."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"  # text can never become markup, whoever wrote it
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def playground_routes(payload_limit: int) -> list[Route]:
    """What to mount. The files are read once, now.

    Args:
        payload_limit: bytes of one request body; the page says so before it sends more.
    """
    routes = [
        _static(path, _read(name, payload_limit), media_type)
        for path, (name, media_type) in _FILES.items()
    ]
    return [*routes, Route(f"{PAGE}/", _without_slash, methods=["GET"])]


def _read(name: str, payload_limit: int) -> bytes:
    content = (FOLDER / name).read_bytes()
    if not name.endswith(".html"):
        return content
    return Template(content.decode()).substitute(payload_limit=payload_limit).encode()


def _static(path: str, content: bytes, media_type: str) -> Route:
    async def serve(request: Request) -> Response:
        return Response(content, headers={"content-type": media_type, **_HEADERS})

    return Route(path, serve, methods=["GET"])


async def _without_slash(request: Request) -> Response:
    """Relative, because a proxy may serve all this below a prefix of its own."""
    return RedirectResponse(f"..{PAGE}")
