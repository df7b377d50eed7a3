"""The API's description, OpenAPI 3.1.

Bodies and replies are described by their own types, routes in `operations`.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from tessera.router.operations import EVENTS, JSON, OPERATIONS, Operation

SCHEMAS = "#/components/schemas/{model}"
_ABOUT_STATUS = {
    200: "Done.",
    400: "The body is not JSON.",
    401: "No or a wrong key.",
    404: "There is no such model.",
    413: "The body is larger than PAYLOAD_LIMIT.",
    415: "The body is not declared as JSON, or is compressed.",
    422: "A field is missing, of the wrong type or out of range; the message names it.",
    424: "A step failed on a shard; this request is lost, the server is not.",
    429: "No room now. Retry later.",
    500: "A defect of this server.",
    503: "The model is loading, draining or lost.",
}
_HEADERS = {
    "x-request-id": "The client's own id where it sent a harmless one, else a new one.",
    "retry-after": "Seconds after which to try again.",
    "x-compute-type": "Number of shards and kind of device.",
    "x-compute-characters": "Characters of the prompt.",
    "x-warnings": "What was done differently than asked; only where there is something to say.",
    "x-compute-time": "Seconds from reading the body to the reply.",
    "x-total-time": "Milliseconds altogether.",
    "x-validation-time": "Milliseconds until the prompt was checked and tokenised.",
    "x-queue-time": "Milliseconds until the first step.",
    "x-inference-time": "Milliseconds from the first step to the last token.",
    "x-time-per-token": "Milliseconds of inference per token.",
    "x-prompt-tokens": "Tokens of the prompt.",
    "x-generated-tokens": "Tokens of the answer.",
}
_NOT_TIMED = ("x-request-id", "retry-after")
_ABOUT = (
    "text-generation-inference's API and OpenAI's. Fields nobody knows are ignored, and null means "
    "absent everywhere. A stream's status is sent when its first token or its failure is known; "
    "what fails later is its last event."
)


def openapi_document(version: str) -> dict[str, Any]:
    """The whole description of this version of the server."""
    types: dict[str, TypeAdapter[Any]] = {}
    for operation in OPERATIONS:
        for shape in (operation.body, operation.error, *operation.replies.values()):
            if shape is not None:
                types.setdefault(str(shape), TypeAdapter(shape))
    schemas, shared = TypeAdapter.json_schemas(
        [(name, "validation", adapter) for name, adapter in types.items()], ref_template=SCHEMAS
    )
    schema_of = {name: schema for (name, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tessera", "version": version, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": shared["$defs"],
            "headers": {
                name: {"description": text, "schema": {"type": "string"}}
                for name, text in _HEADERS.items()
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "API_KEY, where the server was started with one.",
                }
            },
        },
        "security": [{"key": []}, {}],
    }


def _operation(operation: Operation, schema_of: dict[str, Any]) -> dict[str, Any]:
    path = operation.path.replace("/", "_").replace("-", "_").replace(".", "_")
    described: dict[str, Any] = {
        "operationId": (operation.method + path.rstrip("_")).replace("{", "").replace("}", ""),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {"200": _success(operation, schema_of)},
    }
    if operation.body is not None:
        examples = {name: {"value": body} for name, body in operation.examples.items()}
        described["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schema_of[str(operation.body)], "examples": examples}},
        }
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if 401 not in operation.failures:
        described["security"] = []  # open whatever the server was started with
    for status in operation.failures:
        described["responses"][str(status)] = {
            "description": _ABOUT_STATUS[status],
            "headers": _headers(_NOT_TIMED if status in (429, 503) else _NOT_TIMED[:1]),
            "content": {JSON: {"schema": schema_of[str(operation.error)]}},
        }
    return described


def _success(operation: Operation, schema_of: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in _HEADERS if operation.timed or name in _NOT_TIMED]
    reply: dict[str, Any] = {
        "description": _ABOUT_STATUS[200],
        "headers": _headers([name for name in names if name != "retry-after"]),
    }
    if operation.replies:
        reply["content"] = {
            media: {
                "schema": _content(
                    media, schema_of[str(shape)], ends_with_done=operation.tag != "native"
                )
            }
            for media, shape in operation.replies.items()
        }
    return reply


def _content(media: str, payload: Any, *, ends_with_done: bool) -> Any:
    """`payload`, or for streams one event around it: an object of the event's fields."""
    if media != EVENTS:
        return payload
    coded = {"type": "string", "contentMediaType": JSON, "contentSchema": payload}
    data = {"anyOf": [{"const": "[DONE]"}, coded]} if ends_with_done else coded
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _headers(names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
