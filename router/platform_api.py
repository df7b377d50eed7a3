"""The routes that hosting platforms call: SageMaker's and Vertex AI's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from tessera.router.errors import ValidationError
from tessera.router.event_stream import unless_client_leaves
from tessera.router.fairness import fairness_key
from tessera.router.json_body import read_body
from tessera.router.native_api import NativeApi
from tessera.router.native_bodies import GenerateBody, InvocationBody, VertexBody
from tessera.router.native_replies import VertexReply
from tessera.router.openai_api import OpenAIApi
from tessera.router.replies import Json
from tessera.router.schemas import ChatBody
from tessera.router.ticket import Generation, Ticket
from tessera.router.timing_headers import compute_headers, timing_headers
from tessera.router.token_streams import Collected, collect_all
from tessera.router.validation import Plan


@dataclass(frozen=True, slots=True)
class PlatformApi:
    """The platforms' routes over those of the two APIs."""

    native: NativeApi
    openai: OpenAIApi

    def routes(self) -> list[Route]:
        """What to mount."""
        return [
            Route("/invocations", self.invocations, methods=["POST"]),
            Route("/vertex", self.vertex, methods=["POST"]),
        ]

    async def invocations(self, request: HttpRequest) -> Response:
        """POST /invocations: a body of POST /, of a chat or of a plain completion, by its fields.

        Answered as that route answers it, streams included.
        """
        body = await read_body(request, InvocationBody)
        if body.inputs is not None:
            return await self.native.compat_generate(request)
        if body.messages is not None:
            return await self.openai.chat(request)
        if body.prompt is not None:
            return await self.openai.completions(request)
        raise ValidationError("the body needs `inputs`, `messages` or `prompt`.")

    async def vertex(self, request: HttpRequest) -> Response:
        """POST /vertex: one text for each of several native prompts or chats."""
        began = time.perf_counter()
        native = self.native
        with native.desk.ticket(request.state.record) as ticket:
            body = await read_body(request, VertexBody)
            plans = [self._plan(index, one) for index, one in enumerate(body.instances)]
            generations = await self._submit(request, ticket, plans, began)
            collected = await unless_client_leaves(request, collect_all(generations))
        best = _best_of_each(plans, collected)
        reply: VertexReply = {"predictions": [one.completion.text for one in best]}
        headers = compute_headers(native.info, native.generator, [one.generation for one in best])
        return Json(reply, headers=headers | timing_headers(best, time.perf_counter() - began))

    def _plan(self, index: int, instance: GenerateBody | ChatBody) -> Plan:
        if instance.stream:
            name = f"instances[{index}].stream"
            raise ValidationError(f"`{name}` is not supported: this route has no streams.", name)
        if isinstance(instance, GenerateBody):
            return self.native.validator.plan_native(instance, streaming=False)
        return self.native.validator.plan_chat(instance)

    async def _submit(
        self, request: HttpRequest, ticket: Ticket, plans: Sequence[Plan], arrived: float
    ) -> list[Generation]:
        ticket.admit(sum(plan.count for plan in plans))
        key, stages = fairness_key(request.headers), request.state.record.stages
        requests = []
        for plan in plans:
            building = self.native.validator.build(plan, arrived, key, stages)
            requests += await unless_client_leaves(request, building)
        return ticket.submit(requests)


def _best_of_each(plans: Sequence[Plan], collected: Sequence[Collected]) -> list[Collected]:
    """The likeliest answer to each plan's prompt."""
    answers = iter(collected)
    return [
        max((next(answers) for _ in range(plan.count)), key=lambda one: one.mean_logprob)
        for plan in plans
    ]
