"""The routes that the API's description names: what each takes and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tessera.router import openai_shapes as openai
from tessera.router.native_bodies import GenerateBody, VertexBody
from tessera.router.native_replies import (
    ChatTokenizeReply,
    GenerateReply,
    PictureAnswer,
    SpanReply,
    StreamEvent,
    VertexReply,
)
from tessera.router.openai_shapes import NativeError, OpenAIError
from tessera.router.schemas import ChatBody, CompletionBody
from tessera.router.server_info import Info

JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html"
METRICS = "text/plain"

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
        summary="Generate; `stream` chooses between a list with one answer and a stream. Takes the "
        "picture tasks of Hugging Face's clients, too: image bytes, or `image` and `question`",
        body=GenerateBody,
        examples={"text": _PROMPT, "stream": _PROMPT | {"stream": True}},
        replies={JSON: list[GenerateReply] | list[PictureAnswer], EVENTS: StreamEvent},
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
            JSON: list[GenerateReply]
            | list[PictureAnswer]
            | openai.ChatReply
            | openai.CompletionReply,
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
