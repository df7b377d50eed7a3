"""What a request's trace says: spans made of its record.

    POST /v1/chat/completions      the whole request, to the last byte of the reply
      validation                   with its parts: compile grammar, read pictures, decode pictures
      queue                        from submission to the first step that computes for it
      prefill                      to the first token
      decode                       to the last one

The last three once for each answer. Names are those of OpenTelemetry's conventions for HTTP and
generative AI where they have one, else they begin with `tessera.`. Steps are shared by many
requests, so a shard's part is told as sums: how many steps computed something for this request and
what rank 0 measured of them.
"""

from dataclasses import dataclass

from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

from tessera.router.generation import TokenStream
from tessera.router.progress import Progress, StepTimes
from tessera.router.request_record import CANCELLED, RequestRecord

Attributes = dict[str, str | int | float | list[str]]

CHAT_ROUTES = frozenset({"/v1/chat/completions"})


def describe(tracer: Tracer, span: Span, record: RequestRecord) -> None:
    """Fill in a request's own span, which the caller ends, and add the spans of its parts."""
    span.update_name(f"{record.method} {record.route}".strip())
    span.set_attributes(_http_attributes(record) | _model_attributes(record))
    if record.is_our_fault:
        span.set_status(Status(StatusCode.ERROR))
    children = _Children(tracer, record)
    children.add_stages(span)
    for number, stream in enumerate(record.streams):
        several: Attributes = {"tessera.answer": number} if len(record.streams) > 1 else {}
        children.add_generation(span, stream, several)


def _http_attributes(record: RequestRecord) -> Attributes:
    attributes: Attributes = {
        "http.request.method": record.method,
        "tessera.request_id": record.request_id,
    }
    if record.route:
        attributes["http.route"] = record.route
    if record.status is not None:
        attributes["http.response.status_code"] = record.status
    if record.error_type:
        attributes["error.type"] = record.error_type
    if record.param:
        attributes["tessera.error.param"] = record.param
    return attributes


def _model_attributes(record: RequestRecord) -> Attributes:
    if not record.generations:
        return {}
    prompts, streams = record.prompts, record.streams
    return {
        "gen_ai.operation.name": "chat" if record.route in CHAT_ROUTES else "text_completion",
        "gen_ai.provider.name": "tessera",
        "gen_ai.request.model": record.model_name,
        "gen_ai.response.model": record.model_name,
        "gen_ai.request.max_tokens": record.generations[0][0].stopping.max_new_tokens,
        "gen_ai.request.choice.count": len(streams),
        "gen_ai.usage.input_tokens": sum(stream.prompt_tokens for stream in prompts),
        "gen_ai.usage.cache_read.input_tokens": sum(stream.cached_tokens for stream in prompts),
        "gen_ai.usage.output_tokens": sum(stream.progress.generated_tokens for stream in streams),
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "tessera.usage.image_tokens": sum(stream.image_tokens for stream in prompts),
    }


@dataclass(frozen=True, slots=True)
class _Children:
    """Adds the spans of a request's parts."""

    tracer: Tracer
    record: RequestRecord

    def add_stages(self, root: Span) -> None:
        spans: dict[int, Span] = {}
        for stage in self.record.stages.all:
            parent = spans.get(id(stage.parent), root)
            spans[id(stage)] = span = self._start(stage.name, parent, stage.began)
            self._end(span, stage.ended, failed=stage.failed)

    def add_generation(self, root: Span, stream: TokenStream, several: Attributes) -> None:
        progress = stream.progress
        is_over = progress.finish_reason is not None
        last = progress.last_token_at if is_over else self.record.ended
        moments = [progress.submitted_at, progress.started_at, progress.first_token_at]
        reached = [moment for moment in moments if moment is not None]
        ends = [*reached[1:], last if last is not None else self.record.ended]
        parts = (
            ("queue", several),
            ("prefill", several | _prompt(stream) | _steps(progress.prefill)),
            ("decode", several | _answer(progress) | _steps(progress.decode)),
        )
        for number, ((name, attributes), began, ended) in enumerate(
            zip(parts, reached, ends, strict=False)
        ):
            span = self._start(name, root, began, attributes)
            for moment in progress.preempted_at:
                if began <= moment <= ended:
                    span.add_event("preempted", timestamp=self.record.at_ns(moment))
            self._end(span, ended, failed=not is_over and number == len(reached) - 1)

    def _start(
        self, name: str, parent: Span, began: float, attributes: Attributes | None = None
    ) -> Span:
        context = set_span_in_context(parent)
        start_time = self.record.at_ns(began)
        return self.tracer.start_span(name, context, attributes=attributes, start_time=start_time)

    def _end(self, span: Span, ended: float, *, failed: bool) -> None:
        """`failed`: it is the part in which the request ended early, whoever's fault it was."""
        if failed:
            span.set_attribute("error.type", self.record.error_type or CANCELLED)
            if self.record.is_our_fault:
                span.set_status(Status(StatusCode.ERROR))
        span.end(self.record.at_ns(ended))


def _prompt(stream: TokenStream) -> Attributes:
    return {
        "tessera.prompt_tokens": stream.prompt_tokens,
        "tessera.image_tokens": stream.image_tokens,
        "tessera.cached_tokens": stream.cached_tokens,
    }


def _answer(progress: Progress) -> Attributes:
    return {
        "tessera.generated_tokens": progress.generated_tokens,
        "tessera.preemptions": len(progress.preempted_at),
    }


def _steps(times: StepTimes) -> Attributes:
    """Seconds of whole steps, which may have computed for others too."""
    return {
        "tessera.steps": times.steps,
        "tessera.shard.vision_s": times.vision_ns / 1e9,
        "tessera.shard.forward_s": times.forward_ns / 1e9,
        "tessera.shard.sample_s": times.sample_ns / 1e9,
    }
