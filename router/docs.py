"""The API's description, as JSON and as a page that needs nothing from elsewhere."""

import base64
import hashlib
import json
from collections.abc import Iterator
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tessera.router.event_stream import to_json
from tessera.router.openapi import openapi_document
from tessera.router.operations import HTML, JSON

PAGE = "/docs"
DOCUMENTS = ("/openapi.json", "/api-doc/openapi.json")
PATHS = frozenset({PAGE, *DOCUMENTS})
"""Addresses that need no key: they say what the source says, nothing of the model."""

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1c1c1c;background:#fff}code,pre{font:14px/1.4 ui-monospace,monospace}"
    "summary{padding:.5rem;cursor:pointer}details{border:1px solid #ccc;border-radius:4px;"
    "margin:.5rem 0}details>:not(summary){margin:.5rem 1rem}"
    "b.post{color:#0a5f2c}b.get{color:#0b4f9e}"
    "pre{background:#f4f4f4;padding:.5rem;overflow:auto}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem .2rem 0;text-align:left;"
    "vertical-align:top}@media(prefers-color-scheme:dark){body{color:#e8e8e8;background:#161616}"
    "pre{background:#242424}b.post{color:#6fce8f}b.get{color:#79b4f2}a{color:#79b4f2}"
    "details{border-color:#444}td,th{border-color:#333}}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_PAGE_HEADERS = {
    "content-type": f"{HTML}; charset=utf-8",
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def docs_routes(version: str) -> list[Route]:
    """What to mount. Everything is written once, now."""
    document = openapi_document(version)
    described = to_json(document).encode("ascii")
    pages = [_static(path, described, {"content-type": JSON}) for path in DOCUMENTS]
    return [*pages, _static(PAGE, docs_page(document).encode(), _PAGE_HEADERS)]


def docs_page(document: dict[str, Any]) -> str:
    """An OpenAPI document as HTML without scripts."""
    info = document["info"]
    sections = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = document["components"]["schemas"]
    shapes = [_shape(name, schema) for name, schema in schemas.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info['description'])}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{''.join(sections)}<h2>Shapes</h2>{''.join(shapes)}</html>"
    )


def _static(path: str, content: bytes, headers: dict[str, str]) -> Route:
    async def serve(request: Request) -> Response:
        return Response(content, headers=headers)

    return Route(path, serve, methods=["GET"])


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    reads = operation.get("requestBody", {}).get("content", {}).get(JSON, {})
    parts = [
        f'<details><summary><b class="{method}">{method.upper()}</b> <code>{escape(path)}</code> '
        f"{escape(operation['summary'])}</summary>"
    ]
    if reads:
        parts.append(f"<p>Reads {_type(reads['schema'])}</p>")
        parts += [_curl(path, one["value"]) for one in reads["examples"].values()]
    rows = "".join(
        f"<tr><td>{status}<td>{escape(reply['description'])}<td>{_contents(reply)}"
        for status, reply in operation["responses"].items()
    )
    parts.append(f"<table><tr><th>Status<th>Meaning<th>Content{rows}</table></details>")
    return "".join(parts)


def _curl(path: str, body: Any) -> str:
    text = json.dumps(body, indent=2).replace("'", "'\\''")
    command = f"curl -N $URL{path} -H 'content-type: {JSON}' -d '{text}'"
    return f"<pre>{escape(command)}</pre>"


def _contents(reply: dict[str, Any]) -> str:
    return "<br>".join(
        f"<code>{media}</code> {_type(_payload(content['schema']))}"
        for media, content in reply.get("content", {}).items()
    )


def _payload(schema: dict[str, Any]) -> dict[str, Any]:
    """What a reply holds: of an event, its data."""
    data = schema.get("properties", {}).get("data", {})
    *_, coded = data.get("anyOf", [data])
    payload: dict[str, Any] = coded.get("contentSchema", schema)
    return payload


def _shape(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code>{'' if key in required else ' (optional)'}"
        f"<td>{_type(field)}<td>{escape(field.get('description', ''))}"
        for key, field in schema["properties"].items()
    )
    return (
        f'<details id="{name}"><summary><code>{name}</code> '
        f"{escape(schema.get('description', ''))}</summary><table>{rows}</table></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_types(schema)))


def _types(schema: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield f'<a href="#{name}">{name}</a>'
    elif "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _types(one)
    elif schema.get("type") == "array":
        yield f"list of ({_type(schema.get('items', {}))})"
    elif "const" in schema or "enum" in schema:
        for value in schema.get("enum", [schema.get("const")]):
            yield f"<code>{escape(json.dumps(value))}</code>"
    else:
        yield escape(str(schema.get("type", "anything")))
