"""The API's description, OpenAPI 3.1: which routes there are, what they take and what they answer.

Bodies and replies are described by their own types; this file adds the routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from tessera.router import openai_shapes as openai
from tessera.router.native_bodies import GenerateBody, VertexBody
from tessera.router.native_replies import (
    ChatTokenizeReply,
    GenerateReply,
    SpanReply,
    StreamEvent,
    VertexReply,
)
from tessera.router.openai_shapes import NativeError, OpenAIError
from tessera.router.schemas import ChatBody, CompletionBody
from tessera.router.server_info import Info

JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html"
METRICS = "text/plain"
SCHEMAS = "#/components/schemas/{model}"

_PROMPT = {
    "inputs": "[INST] Hello [/INST]",
    "parameters": {"max_new_tokens": 20, "details": True},
}
_CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
_COMPLETION = {"prompt": "[INST] Hello [/INST]", "max_tokens": 20}
_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4APMOGV"
    "HbHSAEEsAROxCnMTAAAAAElFTkSuQmCC"
)
_PICTURE_CHAT = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": _PICTURE}},
                {"type": "text", "text": "Which colour is this?"},
            ],
        }
    ],
    "max_tokens": 20,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    tag: str = "native"
    body: Any = None  # type of what is read
    examples: dict[str, Any] = field(default_factory=dict)  # bodies by name; each is answered
    replies: dict[str, Any] = field(default_factory=dict)  # by media type; empty: no content
    failures: Sequence[int] = ()
    timed: bool = False  # whether the `x-` headers about time and tokens are sent
    parameters: Sequence[dict[str, Any]] = ()

    @property
    def error(self) -> Any:
        """The shape of its refusals and failures."""
        return OpenAIError if self.path.startswith("/v1/") else NativeError


_BODY_FAILURES = (400, 401, 413, 415, 422)
_WORK_FAILURES = (*_BODY_FAILURES, 424, 429, 500, 503)

OPERATIONS = (
    Operation(
        method="post",
        path="/",
        summary="Generate; `stream` chooses between a list with one answer and a stream",
        body=GenerateBody,
        examples={"text": _PROMPT, "stream": _PROMPT | {"stream": True}},
        replies={JSON: list[GenerateReply], EVENTS: StreamEvent},
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="post",
        path="/generate",
        summary="Generate an answer to a prompt",
        body=GenerateBody,
        examples={"text": _PROMPT},
        replies={JSON: GenerateReply},
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="post",
        path="/generate_stream",
        summary="Generate, with one server-sent event for each token",
        body=GenerateBody,
        examples={"text": _PROMPT},
        replies={EVENTS: StreamEvent},
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="post",
        path="/tokenize",
        summary="The tokens of a prompt and the characters they stand for",
        body=GenerateBody,
        examples={"text": {"inputs": "Hello"}},
        replies={JSON: list[SpanReply]},
        failures=_WORK_FAILURES,
    ),
    Operation(
        method="post",
        path="/chat_tokenize",
        summary="A chat as the model's template renders it, and its tokens",
        body=ChatBody,
        examples={"chat": _CHAT},
        replies={JSON: ChatTokenizeReply},
        failures=_WORK_FAILURES,
    ),
    Operation(
        method="post",
        path="/v1/chat/completions",
        tag="openai",
        summary="Answer a chat, as OpenAI's API does",
        body=ChatBody,
        examples={"text": _CHAT, "picture": _PICTURE_CHAT, "stream": _CHAT | {"stream": True}},
        replies={JSON: openai.ChatReply, EVENTS: openai.ChatChunk},
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        tag="openai",
        summary="Go on with one or several prompts, as OpenAI's older API does",
        body=CompletionBody,
        examples={"text": _COMPLETION, "stream": _COMPLETION | {"stream": True}},
        replies={JSON: openai.CompletionReply, EVENTS: openai.CompletionReply},
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="get",
        path="/v1/models",
        tag="openai",
        summary="The model that is served, as a list",
        replies={JSON: openai.ModelList},
        failures=(401,),
    ),
    Operation(
        method="get",
        path="/v1/models/{name}",
        tag="openai",
        summary="The model that is served",
        replies={JSON: openai.ModelCard},
        failures=(401, 404),
        parameters=[
            {
                "name": "name",
                "in": "path",
                "required": True,
                "description": "What GET /v1/models calls it.",
                "schema": {"type": "string", "minLength": 1},
            }
        ],
    ),
    Operation(
        method="post",
        path="/invocations",
        tag="platforms",
        summary="SageMaker: a body of POST /, of a chat or of a completion, by its fields",
        body=GenerateBody | ChatBody | CompletionBody,
        examples={"native": _PROMPT, "chat": _CHAT, "completion": _COMPLETION},
        replies={
            JSON: list[GenerateReply] | openai.ChatReply | openai.CompletionReply,
            EVENTS: StreamEvent | openai.ChatChunk | openai.CompletionReply,
        },
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="post",
        path="/vertex",
        tag="platforms",
        summary="Vertex AI: one text for each of several prompts or chats",
        body=VertexBody,
        examples={"two": {"instances": [_PROMPT, _CHAT]}},
        replies={JSON: VertexReply},
        failures=_WORK_FAILURES,
        timed=True,
    ),
    Operation(
        method="get",
        path="/info",
        tag="server",
        summary="The model and the limits; null before the warm-up has found them out",
        replies={JSON: Info},
        failures=(401,),
    ),
    *(
        Operation(
            method="get",
            path=path,
            tag="server",
            summary="200 while requests are served, 503 while loading, draining or after a loss",
            replies={},
            failures=(503,),
        )
        for path in ("/", "/health", "/ping")
    ),
    Operation(
        method="get",
        path="/metrics",
        tag="server",
        summary="Counters, gauges and histograms in Prometheus' text format",
        replies={METRICS: str},
        failures=(401,),
    ),
    Operation(
        method="get",
        path="/docs",
        tag="server",
        summary="This description as a page",
        replies={HTML: str},
    ),
    *(
        Operation(
            method="get",
            path=path,
            tag="server",
            summary="This description as JSON",
            replies={JSON: dict[str, Any]},
        )
        for path in ("/openapi.json", "/api-doc/openapi.json")
    ),
)

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
