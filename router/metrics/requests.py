"""What becomes of requests: how many, how long, how many tokens."""

from typing import Literal

from tessera.router.generation import ServingLimits
from tessera.router.metrics import buckets
from tessera.router.metrics.instruments import Histogram, Registry
from tessera.router.request import Completion, FinishReason

FailureKind = Literal["validation", "overloaded", "generation", "incomplete", "template", "dropped"]

FAILURE_KINDS: tuple[FailureKind, ...] = (
    "validation",
    "overloaded",
    "generation",
    "incomplete",
    "template",
    "dropped",
)
UNKNOWN_LIMIT = 4096  # places the buckets until the warm-up is done; nothing is counted before


class RequestMetrics:
    """Numbers about requests. Each is one generation: `n`, `best_of` and prompts all count."""

    def __init__(self, registry: Registry) -> None:
        self._count(registry)
        self._time(registry)
        self._count_tokens(registry)

    def _count(self, registry: Registry) -> None:
        self._started = registry.counter(
            "tgi_request_count", "Requests that came in, each once, refused ones included"
        )
        self._succeeded = registry.counter("tgi_request_success", "Requests that completed")
        self._failed = registry.counters(
            "tgi_request_failure", "HTTP requests that did not complete, each once, by cause", "err"
        )
        for kind in FAILURE_KINDS:
            self._failed.of(kind)
        self._reasons = registry.counters(
            "tessera_request_success_total",
            "Requests that completed, by what ended them",
            "finished_reason",
            like="vllm:request_success_total",
        )
        for reason in FinishReason:
            self._reasons.of(reason.value)

    def _time(self, registry: Registry) -> None:
        def at_success(name: str, meaning: str, like: str = "") -> Histogram:
            meaning = f"{meaning}, seconds; counted when the request has completed"
            return registry.histogram(name, meaning, buckets.TGI_SECONDS, like)

        self._duration = at_success(
            "tgi_request_duration",
            "From arrival to the last token",
            "vllm:e2e_request_latency_seconds, gen_ai.server.request.duration",
        )
        self._validation = at_success(
            "tgi_request_validation_duration", "Checking, tokenising and preparing pictures"
        )
        self._queue = at_success("tgi_request_queue_duration", "Waiting for the first step")
        self._inference = at_success(
            "tgi_request_inference_duration",
            "From the first step to the last token",
            "vllm:request_inference_time_seconds",
        )
        self._per_token = at_success(
            "tgi_request_mean_time_per_token_duration",
            "Inference time over generated tokens",
            "vllm:request_time_per_output_token_seconds, gen_ai.server.time_per_output_token",
        )
        self._time_stages(registry)

    def _time_stages(self, registry: Registry) -> None:
        self._first_token = registry.histogram(
            "tessera_time_to_first_token_seconds",
            "From arrival to the first token, whatever becomes of the request",
            buckets.FIRST_TOKEN_S,
            like="vllm:time_to_first_token_seconds, gen_ai.server.time_to_first_token",
        )
        self._next_token = registry.histogram(
            "tessera_inter_token_latency_seconds",
            "From one token of a request to its next",
            buckets.NEXT_TOKEN_S,
            like="vllm:inter_token_latency_seconds",
        )
        self._waited = registry.histogram(
            "tessera_request_queue_time_seconds",
            "Waiting for the first step, counted at that step",
            buckets.REQUEST_S,
            like="vllm:request_queue_time_seconds",
        )
        self._prefill = registry.histogram(
            "tessera_request_prefill_time_seconds",
            "From the first step to the first token, counted when the request has completed",
            buckets.REQUEST_S,
            like="vllm:request_prefill_time_seconds",
        )
        self._decode = registry.histogram(
            "tessera_request_decode_time_seconds",
            "From the first token to the last, counted when the request has completed",
            buckets.REQUEST_S,
            like="vllm:request_decode_time_seconds",
        )

    def _count_tokens(self, registry: Registry) -> None:
        limit = buckets.hundredths(UNKNOWN_LIMIT)
        self._input_length = registry.histogram(
            "tgi_request_input_length",
            "Prompt tokens of a request, images included; counted when it is found to be in order",
            limit,
            "vllm:request_prompt_tokens",
        )
        self._max_new = registry.histogram(
            "tgi_request_max_new_tokens",
            "Most tokens a request may generate, counted then, too",
            limit,
            "vllm:request_params_max_tokens",
        )
        self._generated = registry.histogram(
            "tgi_request_generated_tokens",
            "Tokens a request has generated, counted when it has completed",
            limit,
            "vllm:request_generation_tokens",
        )
        self._skipped = registry.histogram(
            "tgi_request_skipped_tokens",
            "Tokens a request got without a step of their own, counted when it has completed; "
            "0, because nothing is speculated",
            buckets.SKIPPED_TOKENS,
        )
        self._prompt_tokens = registry.counter(
            "tessera_prompt_tokens_total",
            "Prompt tokens of requests, images included, counted at a request's first step",
            like="vllm:prompt_tokens_total, gen_ai.client.token.usage (input)",
        )
        self._cached_tokens = registry.counter(
            "tessera_prompt_tokens_cached_total",
            "Those of them that were found in the prefix cache",
            like="vllm:prompt_tokens_cached_total",
        )
        self._image_tokens = registry.counter(
            "tessera_image_tokens_total", "Those of them that stand for pictures"
        )
        self._generation_tokens = registry.counter(
            "tessera_generation_tokens_total",
            "Tokens generated, counted one by one, whatever becomes of the request",
            like="vllm:generation_tokens_total, gen_ai.client.token.usage (output)",
        )

    def open(self, limits: ServingLimits) -> None:
        """Place the buckets for tokens; nothing has been counted yet."""
        self._input_length.place(buckets.hundredths(limits.max_input_tokens))
        self._max_new.place(buckets.hundredths(limits.max_total_tokens))
        self._generated.place(buckets.hundredths(limits.max_total_tokens))

    def started(self) -> None:
        """A generation was asked for."""
        self._started.increase()

    def validated(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """A generation was found to be in order."""
        self._input_length.observe(prompt_tokens)
        self._max_new.observe(max_new_tokens)

    def first_step(self, queue_s: float, prompt: int, cached: int, image: int) -> None:
        """A step computes something for a request that had none yet; numbers of tokens."""
        self._waited.observe(queue_s)
        self._prompt_tokens.increase(prompt)
        self._cached_tokens.increase(cached)
        self._image_tokens.increase(image)

    def first_token(self, seconds: float) -> None:
        """A request got its first token, so long after its arrival."""
        self._generation_tokens.increase()
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A request got another token, so long after the one before."""
        self._generation_tokens.increase()
        self._next_token.observe(seconds)

    def finished(self, completion: Completion) -> None:
        """A generation completed."""
        timings = completion.timings
        self._succeeded.increase()
        self._reasons.of(completion.reason.value).increase()
        self._duration.observe(timings.total)
        self._validation.observe(timings.validation)
        self._queue.observe(timings.queue)
        self._inference.observe(timings.inference)
        self._per_token.observe(timings.per_token(completion.generated_tokens))
        self._prefill.observe(timings.prompt)
        self._decode.observe(max(0.0, timings.inference - timings.prompt))
        self._generated.observe(completion.generated_tokens)
        self._skipped.observe(0)

    def failed(self, kind: FailureKind) -> None:
        """A request ended without completing."""
        self._failed.of(kind).increase()
