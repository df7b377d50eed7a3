"""The OpenAI-compatible routes."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from tessera.router.chat_replies import ChatWriter, chat_choice
from tessera.router.completion_replies import CompletionWriter, completion_choice
from tessera.router.errors import NotFound
from tessera.router.event_stream import EventStream, unless_client_leaves
from tessera.router.fairness import fairness_key
from tessera.router.generation import Generator
from tessera.router.json_body import read_body
from tessera.router.notices import warnings_field
from tessera.router.openai_stream import ChoiceWriter, ChunkWriter
from tessera.router.openai_usage import usage
from tessera.router.replies import Json
from tessera.router.schemas import ChatBody, CompletionBody, OpenAIBody
from tessera.router.server_info import ServerInfo
from tessera.router.ticket import Desk, Generation, Ticket
from tessera.router.timing_headers import compute_headers, timing_headers
from tessera.router.token_streams import Collected, EventTexts, collect_all
from tessera.router.validation import Plan, Validator


@dataclass(frozen=True, slots=True)
class OpenAIApi:
    """The OpenAI routes over what they need."""

    generator: Generator
    validator: Validator
    desk: Desk
    info: ServerInfo

    def routes(self) -> list[Route]:
        """What to mount."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
        ]

    async def chat(self, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        with self.desk.ticket(request.state.record) as ticket:
            body = await read_body(request, ChatBody)
            began = time.perf_counter()
            plan = self.validator.plan_chat(body)
            generations = await self._submit(request, ticket, plan, began)
            if body.stream:
                envelope = self._envelope("chatcmpl", "chat.completion.chunk")
                writer = ChatWriter(body, plan.calls)
                return await self._stream(request, ticket, generations, writer, envelope, body)
            collected = await unless_client_leaves(request, collect_all(generations))
            choices = [
                chat_choice(index, one, body, plan.calls) for index, one in enumerate(collected)
            ]
            envelope = self._envelope("chatcmpl", "chat.completion")
            return self._reply(envelope, choices, collected, body, began)

    async def completions(self, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        with self.desk.ticket(request.state.record) as ticket:
            body = await read_body(request, CompletionBody)
            began = time.perf_counter()
            plan = self.validator.plan_completion(body)
            generations = await self._submit(request, ticket, plan, began)
            envelope = self._envelope("cmpl", "text_completion")
            if body.stream:
                writer = CompletionWriter(body, generations)
                return await self._stream(request, ticket, generations, writer, envelope, body)
            collected = await unless_client_leaves(request, collect_all(generations))
            choices = [completion_choice(index, one, body) for index, one in enumerate(collected)]
            return self._reply(envelope, choices, collected, body, began)

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models: the one model."""
        return Json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/{name}."""
        if request.path_params["name"] != self.info.model_name:
            raise NotFound("There is no such model here; GET /v1/models lists what there is.")
        return Json(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.info.model_name,
            "object": "model",
            "created": self.info.started_at,
            "owned_by": self.info.model_name,
        }

    def _envelope(self, prefix: str, kind: str) -> dict[str, Any]:
        """What a reply and all chunks of a stream have in common."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.info.model_name,
            "system_fingerprint": self.info.fingerprint,
        }

    async def _submit(
        self, request: HttpRequest, ticket: Ticket, plan: Plan, arrived: float
    ) -> list[Generation]:
        ticket.admit(plan.count)
        key, stages = fairness_key(request.headers), request.state.record.stages
        building = self.validator.build(plan, arrived, key, stages)
        requests = await unless_client_leaves(request, building)
        return ticket.submit(requests)

    def _reply(
        self,
        envelope: dict[str, Any],
        choices: list[dict[str, Any]],
        collected: Sequence[Collected],
        body: OpenAIBody,
        began: float,
    ) -> Response:
        generations = [one.generation for one in collected]
        counts = usage(generations, [one.completion for one in collected], body)
        reply = envelope | {"choices": choices, "usage": counts} | warnings_field(generations)
        headers = compute_headers(self.info, self.generator, generations)
        return Json(reply, headers=headers | timing_headers(collected, time.perf_counter() - began))

    async def _stream(
        self,
        request: HttpRequest,
        ticket: Ticket,
        generations: Sequence[Generation],
        writer: ChoiceWriter,
        envelope: dict[str, Any],
        body: OpenAIBody,
    ) -> Response:
        chunks = ChunkWriter(generations, writer, envelope, body)
        texts = EventTexts(generations, chunks, ticket)
        await unless_client_leaves(request, texts.start())
        ticket.keep()
        return EventStream(
            texts,
            on_end=ticket.close,
            headers=compute_headers(self.info, self.generator, generations),
        )
