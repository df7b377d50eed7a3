"""The OpenAI-compatible routes."""

import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from tessera.router.errors import NotFound, RouterError
from tessera.router.event_stream import DONE, EventStream, event, unless_client_leaves
from tessera.router.fairness import fairness_key
from tessera.router.generation import Generator
from tessera.router.json_body import read_body
from tessera.router.notices import warnings_field
from tessera.router.replies import InternalError, Json, openai_error
from tessera.router.request import Completion, FinishReason, TokenEvent, TokenInfo
from tessera.router.schemas import ChatBody, CompletionBody, OpenAIBody
from tessera.router.server_info import ServerInfo
from tessera.router.ticket import Desk, Generation, Ticket
from tessera.router.timing_headers import compute_headers, timing_headers
from tessera.router.token_streams import Collected, collect_all, merge, started
from tessera.router.validation import Plan, Validator

logger = logging.getLogger(__name__)

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON does not have


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
        with self.desk.ticket(request.state.request_id) as ticket:
            body = await read_body(request, ChatBody)
            began = time.perf_counter()
            generations = await self._submit(request, ticket, self.validator.plan_chat(body), began)
            reply = self._envelope("chatcmpl", "chat.completion")
            if body.stream:
                writer = ChatWriter(reply, body)
                return await self._stream(request, ticket, generations, writer)
            collected = await unless_client_leaves(request, collect_all(generations))
            reply["choices"] = [
                _chat_choice(index, one, body) for index, one in enumerate(collected)
            ]
            return self._reply(reply, collected, body.copies, began)

    async def completions(self, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        with self.desk.ticket(request.state.request_id) as ticket:
            body = await read_body(request, CompletionBody)
            began = time.perf_counter()
            generations = await self._submit(
                request, ticket, self.validator.plan_completion(body), began
            )
            reply = self._envelope("cmpl", "text_completion")
            if body.stream:
                writer = CompletionWriter(reply, body, generations)
                return await self._stream(request, ticket, generations, writer)
            collected = await unless_client_leaves(request, collect_all(generations))
            reply["choices"] = [
                _completion_choice(index, one, body) for index, one in enumerate(collected)
            ]
            return self._reply(reply, collected, body.copies, began)

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
        building = self.validator.build(plan, arrived, fairness_key(request.headers))
        requests = await unless_client_leaves(request, building)
        return ticket.submit(requests)

    def _reply(
        self, reply: dict[str, Any], collected: Sequence[Collected], copies: int, began: float
    ) -> Response:
        generations = [one.generation for one in collected]
        reply["usage"] = _usage(generations, [one.completion for one in collected], copies)
        reply |= warnings_field(generations)
        headers = compute_headers(self.info, self.generator, generations)
        return Json(reply, headers=headers | timing_headers(collected, time.perf_counter() - began))

    async def _stream(
        self,
        request: HttpRequest,
        ticket: Ticket,
        generations: Sequence[Generation],
        writer: "ChunkWriter",
    ) -> Response:
        events = await unless_client_leaves(request, started(merge(generations)))
        ticket.keep()
        return EventStream(
            _stream_events(events, generations, writer, ticket),
            on_end=ticket.close,
            headers=compute_headers(self.info, self.generator, generations),
        )


class ChunkWriter:
    """Turns events into the chunks of one kind of stream."""

    def __init__(self, envelope: dict[str, Any], body: OpenAIBody) -> None:
        self._envelope = envelope
        self._usage: dict[str, Any] = {"usage": None} if body.wants_usage_chunk else {}
        self.wants_usage_chunk = body.wants_usage_chunk
        self.copies = body.copies

    def chunks(self, index: int, step: TokenEvent) -> list[dict[str, Any]]:
        """The chunks one event of choice `index` becomes; often one, sometimes none."""
        raise NotImplementedError

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for the usage."""
        return self._envelope | {"choices": [], "usage": usage}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._envelope | {"choices": [choice]} | self._usage


class ChatWriter(ChunkWriter):
    """Chunks of a chat: the role once, then pieces of content, then the reason for the end."""

    def __init__(self, envelope: dict[str, Any], body: ChatBody) -> None:
        super().__init__(envelope | {"object": "chat.completion.chunk"}, body)
        self._wants_logprobs = bool(body.logprobs)
        self._begun: set[int] = set()

    def chunks(self, index: int, step: TokenEvent) -> list[dict[str, Any]]:
        """See `ChunkWriter.chunks`."""
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._delta(index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(step)
        if step.text or logprobs:
            chunks.append(self._delta(index, {"content": step.text}, logprobs))
        if step.completion is not None:
            reason = _finish_reason(step.completion)
            chunks.append(self._delta(index, {}, reason=reason))
        return chunks

    def _logprobs(self, step: TokenEvent) -> dict[str, Any] | None:
        if not self._wants_logprobs or _is_end_token(step.token, step.completion):
            return None
        return {"content": [_chat_logprob(step.token, step.top_tokens)], "refusal": None}

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return self._chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        )


class CompletionWriter(ChunkWriter):
    """Chunks of a plain completion: pieces of text, the last with the reason for the end."""

    def __init__(
        self, envelope: dict[str, Any], body: CompletionBody, generations: Sequence[Generation]
    ) -> None:
        super().__init__(envelope, body)
        self._wants_logprobs = body.logprobs is not None
        self._offsets = [0] * len(generations)
        self._prefixes = [_echo(generation, body) for generation in generations]

    def chunks(self, index: int, step: TokenEvent) -> list[dict[str, Any]]:
        """See `ChunkWriter.chunks`."""
        text = self._prefixes[index] + step.text
        self._prefixes[index] = ""
        logprobs = None
        if self._wants_logprobs and not _is_end_token(step.token, step.completion):
            logprobs = _completion_logprobs([step.token], [step.top_tokens], self._offsets[index])
            self._offsets[index] += len(step.token.text)
        if not text and not logprobs and step.completion is None:
            return []
        reason = step.completion and _finish_reason(step.completion)
        return [
            self._chunk(
                {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
            )
        ]


async def _stream_events(
    events: AsyncIterator[tuple[int, TokenEvent]],
    generations: Sequence[Generation],
    writer: ChunkWriter,
    ticket: Ticket,
) -> AsyncGenerator[str, None]:
    """The text of the events. Always ends with [DONE], after a failure too, as clients expect."""
    completions = []
    try:
        async for index, step in events:
            if step.completion is not None:
                completions.append(step.completion)
            chunks = writer.chunks(index, step)
            if len(completions) == len(generations) and not writer.wants_usage_chunk:
                chunks[-1] |= warnings_field(generations)
            if chunks:
                yield "".join(map(event, chunks))
        if writer.wants_usage_chunk:
            usage = writer.usage_chunk(_usage(generations, completions, writer.copies))
            yield event(usage | warnings_field(generations))
    except RouterError as error:
        ticket.failed(error)
        yield event(openai_error(error))
    except Exception as error:
        logger.exception("a stream failed")
        ticket.failed(error)
        yield event(openai_error(InternalError()))
    yield DONE


def _finish_reason(completion: Completion) -> str:
    return "length" if completion.reason is FinishReason.LENGTH else "stop"


def _is_end_token(token: TokenInfo, completion: Completion | None) -> bool:
    """Whether a token is the end-of-sequence mark, which is not part of the answer."""
    return token.special and completion is not None and completion.reason is FinishReason.EOS


def _usage(
    generations: Sequence[Generation], completions: Iterable[Completion], copies: int
) -> dict[str, Any]:
    """Each prompt counts once, however many answers to it were asked for."""
    streams = [generation.stream for generation in generations[::copies]]
    prompt_tokens = sum(stream.prompt_tokens for stream in streams)
    generated = sum(completion.generated_tokens for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(stream.cached_tokens for stream in streams),
            "image_tokens": sum(stream.image_tokens for stream in streams),
        },
    }


def _chat_choice(index: int, one: Collected, body: ChatBody) -> dict[str, Any]:
    logprobs = None
    if body.logprobs:
        logprobs = {
            "content": [_chat_logprob(token, top) for token, top in _answer_tokens(one)],
            "refusal": None,
        }
    return {
        "index": index,
        "message": {"role": "assistant", "content": one.completion.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": _finish_reason(one.completion),
    }


def _completion_choice(index: int, one: Collected, body: CompletionBody) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        pairs = _answer_tokens(one)
        logprobs = _completion_logprobs([t for t, _ in pairs], [top for _, top in pairs], 0)
    return {
        "index": index,
        "text": _echo(one.generation, body) + one.completion.text,
        "logprobs": logprobs,
        "finish_reason": _finish_reason(one.completion),
    }


def _echo(generation: Generation, body: CompletionBody) -> str:
    return generation.request.prompt_text if body.echo else ""


def _answer_tokens(one: Collected) -> list[tuple[TokenInfo, tuple[TokenInfo, ...]]]:
    pairs = list(zip(one.tokens, one.top_tokens, strict=True))
    if pairs and _is_end_token(pairs[-1][0], one.completion):
        pairs.pop()
    return pairs


def _logprob(value: float) -> float:
    return value if math.isfinite(value) else LEAST_LOGPROB


def _chat_logprob(token: TokenInfo, top: Sequence[TokenInfo]) -> dict[str, Any]:
    def entry(info: TokenInfo) -> dict[str, Any]:
        return {
            "token": info.text,
            "logprob": _logprob(info.logprob),
            "bytes": list(info.text.encode()),
        }

    return entry(token) | {"top_logprobs": [entry(info) for info in top]}


def _completion_logprobs(
    tokens: Sequence[TokenInfo], tops: Sequence[Sequence[TokenInfo]], offset: int
) -> dict[str, Any]:
    """The older API's four parallel lists; `offset` is where the first token begins, characters."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_logprob(token.logprob) for token in tokens],
        "top_logprobs": [{info.text: _logprob(info.logprob) for info in top} for top in tops],
        "text_offset": offsets,
    }
