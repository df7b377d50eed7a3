"""text-generation-inference's own routes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from tessera.router.errors import NotReadyError, RouterError
from tessera.router.event_stream import EventStream, event, json_event, unless_client_leaves
from tessera.router.fairness import fairness_key
from tessera.router.generation import Generator
from tessera.router.json_body import read_body
from tessera.router.metrics import CONTENT_TYPE, Metrics
from tessera.router.native_bodies import GenerateBody, GenerateParameters
from tessera.router.native_replies import (
    ChatTokenizeReply,
    GenerateReply,
    StreamEvent,
    generate_reply,
    plain_event,
    span_replies,
    stream_event,
)
from tessera.router.picture_tasks import PictureTask, read_root_body
from tessera.router.replies import Json, error_reply, native_error
from tessera.router.request import TokenEvent
from tessera.router.schemas import ChatBody
from tessera.router.server_info import ServerInfo
from tessera.router.ticket import Desk, Generation, Ticket
from tessera.router.timing_headers import compute_headers, timing_headers
from tessera.router.token_streams import EventTexts, collect_all
from tessera.router.validation import Plan, Validator


@dataclass(frozen=True, slots=True)
class NativeApi:
    """The native routes over what they need."""

    generator: Generator
    validator: Validator
    desk: Desk
    metrics: Metrics
    info: ServerInfo

    def routes(self) -> list[Route]:
        """What to mount."""
        return [
            Route("/", self.compat_generate, methods=["POST"]),
            Route("/", self.health, methods=["GET"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/generate_stream", self.generate_stream, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/chat_tokenize", self.chat_tokenize, methods=["POST"]),
            Route("/info", self.show_info, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ping", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]

    async def compat_generate(self, request: HttpRequest) -> Response:
        """POST /: what Hugging Face's clients call; `stream` chooses, and the reply is a list.

        A bare picture is captioned, and one with a question beside it is asked about.
        """
        full_text = self.info.default_full_text
        with self.desk.ticket(request.state.record) as ticket:
            body = await read_root_body(request)
            if isinstance(body, PictureTask):
                return await self._picture_task(request, ticket, body)
            if body.stream:
                return await self._stream(request, ticket, body, full_text)
            reply, headers = await self._generate(request, ticket, body, full_text)
            return Json([reply], headers=headers)

    async def generate(self, request: HttpRequest) -> Response:
        """POST /generate: one JSON object when all is done."""
        with self.desk.ticket(request.state.record) as ticket:
            body = await read_body(request, GenerateBody)
            reply, headers = await self._generate(request, ticket, body, False)
            return Json(reply, headers=headers)

    async def generate_stream(self, request: HttpRequest) -> Response:
        """POST /generate_stream: one server-sent event per token.

        The status is sent when the first token or the error is known, so that a refusal is a
        status. Later errors are the last event.
        """
        with self.desk.ticket(request.state.record) as ticket:
            body = await read_body(request, GenerateBody)
            return await self._stream(request, ticket, body, False)

    async def tokenize(self, request: HttpRequest) -> Response:
        """POST /tokenize: the ids of `inputs` with their text and place in it."""
        body = await read_body(request, GenerateBody)
        with self.desk.place():
            spans = await unless_client_leaves(request, self.validator.tokenize(body.inputs))
        return Json(span_replies(spans))

    async def chat_tokenize(self, request: HttpRequest) -> Response:
        """POST /chat_tokenize: a chat as the model's template renders it, and its tokens."""
        body = await read_body(request, ChatBody)
        with self.desk.place():
            work = self.validator.tokenize_chat(body)
            text, spans = await unless_client_leaves(request, work)
        reply: ChatTokenizeReply = {
            "tokenize_response": span_replies(spans),
            "templated_text": text,
        }
        return Json(reply)

    async def show_info(self, request: HttpRequest) -> Response:
        """GET /info: the model and the limits."""
        return Json(self.info.as_json(self.generator))

    async def health(self, request: HttpRequest) -> Response:
        """GET /health, /ping, /: 200 without a body while requests are served, else 503.

        Reads one flag; a busy model never delays the answer.
        """
        if self.generator.ready:
            return Response()
        return error_reply(NotReadyError("unhealthy"), "/health")

    async def show_metrics(self, request: HttpRequest) -> Response:
        """GET /metrics: Prometheus' text format."""
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _submit(self, request: HttpRequest, ticket: Ticket, plan: Plan) -> list[Generation]:
        arrived = time.perf_counter()
        ticket.admit(plan.count)
        key, stages = fairness_key(request.headers), request.state.record.stages
        building = self.validator.build(plan, arrived, key, stages)
        requests = await unless_client_leaves(request, building)
        return ticket.submit(requests)

    async def _picture_task(
        self, request: HttpRequest, ticket: Ticket, task: PictureTask
    ) -> Response:
        began = time.perf_counter()
        generations = await self._submit(request, ticket, self.validator.plan_chat(task.chat()))
        (answer,) = await unless_client_leaves(request, collect_all(generations))
        headers = compute_headers(self.info, self.generator, generations)
        headers |= timing_headers([answer], time.perf_counter() - began)
        return Json([task.reply(answer)], headers=headers)

    async def _generate(
        self, request: HttpRequest, ticket: Ticket, body: GenerateBody, full_text: bool
    ) -> tuple[GenerateReply, dict[str, str]]:
        began = time.perf_counter()
        generations = await self._submit(
            request, ticket, self.validator.plan_native(body, streaming=False)
        )
        collected = await unless_client_leaves(request, collect_all(generations))
        best, *others = sorted(collected, key=lambda one: one.mean_logprob, reverse=True)
        headers = compute_headers(self.info, self.generator, [best.generation])
        headers |= timing_headers([best], time.perf_counter() - began)
        wants_full = _wants_full_text(body.options, full_text)
        return generate_reply(best, others, body.options, wants_full), headers

    async def _stream(
        self, request: HttpRequest, ticket: Ticket, body: GenerateBody, full_text: bool
    ) -> Response:
        generations = await self._submit(
            request, ticket, self.validator.plan_native(body, streaming=True)
        )
        wants_full = _wants_full_text(body.options, full_text)
        writer = _StreamWriter(generations[0], body.options, wants_full=wants_full)
        texts = EventTexts(generations, writer, ticket)
        await unless_client_leaves(request, texts.start())
        ticket.keep()
        return EventStream(
            texts,
            on_end=ticket.close,
            headers=compute_headers(self.info, self.generator, generations),
        )


def _wants_full_text(options: GenerateParameters, default: bool) -> bool:
    return default if options.return_full_text is None else options.return_full_text


class _StreamWriter:
    """Implements `token_streams.EventWriter` for /generate_stream."""

    def __init__(
        self, generation: Generation, options: GenerateParameters, *, wants_full: bool
    ) -> None:
        self._generation = generation
        self._options = options
        self._wants_full = wants_full
        self._wants_top = bool(options.top_n_tokens)
        self._index = 0

    def write(self, _: int, steps: Sequence[TokenEvent]) -> str:
        text = ""
        for step in steps:
            self._index += 1
            if step.completion is None:
                text += json_event(plain_event(self._index, step, wants_top=self._wants_top))
            else:
                text += event(self._last(step))
        return text

    def end(self) -> str:
        return ""

    def failure(self, error: RouterError) -> str:
        return event(native_error(error))

    def _last(self, step: TokenEvent) -> StreamEvent:
        return stream_event(self._index, step, self._generation, self._options, self._wants_full)
