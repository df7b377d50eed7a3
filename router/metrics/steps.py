"""What the shards are given to do at a time, and how long it takes."""

from typing import Literal

from tessera.proto.shard_pb2 import StepReply
from tessera.router.metrics import buckets
from tessera.router.metrics.instruments import Family, Histogram, Registry, Value
from tessera.router.scheduler import StepPlan

StepKind = Literal["prefill", "mixed", "decode", "release"]
"""Prompts or pictures; those together with decodes; decodes alone; nothing is computed."""

STEP_KINDS: tuple[StepKind, ...] = ("prefill", "mixed", "decode", "release")
METHODS = ("prefill", "decode")
"""text-generation-inference's two kinds: `prefill` is any step with a prompt or a picture in it."""


def kind_of(plan: StepPlan) -> StepKind:
    """What a step is for."""
    if plan.chunks or plan.images:
        return "mixed" if plan.decodes else "prefill"
    return "decode" if plan.decodes else "release"


def _method(kind: StepKind) -> str:
    """The kind as text-generation-inference has it; not for releases, which it does not have."""
    return "decode" if kind == "decode" else "prefill"


class StepMetrics:
    """Numbers about steps. Steps that only release something have a duration, no more."""

    def __init__(self, registry: Registry) -> None:
        self._count(registry)
        self._time(registry)
        self._tokens = registry.histograms(
            "tessera_step_tokens",
            "Tokens computed in one step",
            buckets.STEP_TOKENS,
            "method",
            like="vllm:iteration_tokens_total",
        )
        for method in METHODS:
            self._tokens.of(method)

    def _count(self, registry: Registry) -> None:
        def by_method(name: str, meaning: str) -> Family[Value]:
            family = registry.counters(name, meaning, "method")
            for method in METHODS:
                family.of(method)
            return family

        self._steps = by_method("tgi_batch_inference_count", "Steps that compute something")
        self._done = by_method("tgi_batch_inference_success", "Those that were answered")
        self._lost = by_method("tgi_batch_inference_failure", "Those lost with a shard")
        self._next_size = registry.histogram(
            "tgi_batch_next_size",
            "Sequences that join the batch with one step, preempted ones again",
            buckets.SEQUENCES,
        )
        self._concat = registry.counters(
            "tgi_batch_concat",
            "Steps with which sequences join others; they may join at any step, which is called "
            "chunking",
            "reason",
        ).of("chunking")

    def _time(self, registry: Registry) -> None:
        def seconds(name: str, meaning: str) -> Family[Histogram]:
            family = registry.histograms(name, f"{meaning}, seconds", buckets.TGI_SECONDS, "method")
            for method in METHODS:
                family.of(method)
            return family

        self._duration = seconds(
            "tgi_batch_inference_duration",
            "From when the shards could begin a step to their answer",
        )
        self._forward = seconds(
            "tgi_batch_forward_duration", "A step's pass through the decoder, on rank 0"
        )
        self._sample = seconds("tgi_batch_decode_duration", "Choosing a step's tokens, on rank 0")
        self._take = seconds(
            "tgi_batch_filter_duration",
            "Taking a step's tokens in the router: text, events, letting go of what has ended",
        )
        self._plan = registry.histograms(
            "tgi_batch_concat_duration",
            "Planning a step with which sequences join others, seconds",
            buckets.TGI_SECONDS,
            "method",
        ).of("decode")
        self._by_kind = registry.histograms(
            "tessera_step_duration_seconds",
            "From when the shards could begin a step to their answer, by what was computed; "
            "`release`: nothing",
            buckets.WORK_S,
            "kind",
        )
        for kind in STEP_KINDS:
            self._by_kind.of(kind)
        self._encode = registry.histogram(
            "tessera_image_encode_seconds",
            "Encoding the pictures of one step, on rank 0",
            buckets.WORK_S,
        )

    def planned(self, plan: StepPlan, seconds: float) -> None:
        """A step was decided on within so many seconds."""
        joined = sum(chunk.is_start for chunk in plan.chunks)
        if joined:
            self._next_size.observe(joined)
            if plan.decodes or joined < len(plan.chunks):
                self._concat.increase()
                self._plan.observe(seconds)

    def answered(
        self, kind: StepKind, seconds: float, tokens: int, pictures: int, reply: StepReply
    ) -> None:
        """The shards have computed so many tokens and encoded so many pictures in one step."""
        self._by_kind.of(kind).observe(seconds)
        if kind == "release":
            return
        method = _method(kind)
        self._steps.of(method).increase()
        self._done.of(method).increase()
        self._duration.of(method).observe(seconds)
        self._forward.of(method).observe(reply.forward_ns / 1e9)
        self._sample.of(method).observe(reply.sample_ns / 1e9)
        self._tokens.of(method).observe(tokens)
        if pictures:
            self._encode.observe(reply.vision_ns / 1e9)

    def taken(self, kind: StepKind, seconds: float) -> None:
        """The router has dealt with a step's answer."""
        if kind != "release":
            self._take.of(_method(kind)).observe(seconds)

    def lost(self, kind: StepKind) -> None:
        """A step will never be answered."""
        if kind != "release":
            self._steps.of(_method(kind)).increase()
            self._lost.of(_method(kind)).increase()
