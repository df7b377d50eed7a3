"""What the server counts and measures, under the names that existing dashboards read.

text-generation-inference's counters have no `_total` suffix, which the client library insists on;
`_Counter` and `render` are here for that reason alone.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tessera.proto.shard_pb2 import StepReply
from tessera.router.request import Completion
from tessera.router.scheduler import SchedulerCounts

FailureKind = Literal["validation", "overloaded", "generation", "incomplete", "template", "dropped"]
StepKind = Literal["prefill", "decode"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

DURATION_BUCKETS_S = tuple(0.00015 * 1.5**k for k in range(35))  # 0.15 ms to 146 s
BATCH_BUCKETS = tuple(float(2**k) for k in range(11))
TOKEN_BUCKETS = tuple(float(2**k) for k in range(17))  # 1 to 65,536
NOTHING_ENCODED_NS = 100_000  # the shard measures the look at an empty list, too
_FAILURE_KINDS: tuple[FailureKind, ...] = (
    "validation",
    "overloaded",
    "generation",
    "incomplete",
    "template",
    "dropped",
)
_STEP_KINDS: tuple[StepKind, ...] = ("prefill", "decode")


class Metrics:
    """One server's numbers, in a registry of its own, so that two servers can share a process."""

    def __init__(self, max_input_tokens: int = 4096, max_total_tokens: int = 4096) -> None:
        """`max_*` only place the buckets of the token histograms, so a guess is good enough."""
        self._registry = CollectorRegistry()
        self._counters: list[_Counter] = []
        self._requests = self._counter("tgi_request_count", "Generations asked for")
        self._successes = self._counter("tgi_request_success", "Generations that completed")
        self._failures = self._counter(
            "tgi_request_failure", "Requests that did not, by cause", "err", _FAILURE_KINDS
        )
        self._duration = self._seconds("tgi_request_duration", "From arrival to the last token")
        self._validation = self._seconds(
            "tgi_request_validation_duration", "Checking, tokenising and preparing pictures"
        )
        self._queue = self._seconds("tgi_request_queue_duration", "Waiting for the first step")
        self._inference = self._seconds("tgi_request_inference_duration", "From then to the end")
        self._per_token = self._seconds(
            "tgi_request_mean_time_per_token_duration", "Inference time over generated tokens"
        )
        self._first_token = self._seconds(
            "tessera_time_to_first_token_seconds", "From submission to the first token"
        )
        self._generated = self._tokens(
            "tgi_request_generated_tokens", "Tokens generated per request", max_total_tokens
        )
        self._input_length = self._tokens(
            "tgi_request_input_length",
            "Prompt tokens per request, images included",
            max_input_tokens,
        )
        self._max_new = self._tokens(
            "tgi_request_max_new_tokens", "Tokens asked for per request", max_total_tokens
        )
        self._define_batch_metrics()

    def _define_batch_metrics(self) -> None:
        registry = self._registry
        self._queue_size = Gauge("tgi_queue_size", "Requests waiting", registry=registry)
        self._batch_size = Gauge(
            "tgi_batch_current_size", "Sequences in the running batch", registry=registry
        )
        self._batch_tokens = Gauge(
            "tgi_batch_current_max_tokens", "Cache tokens held by the batch", registry=registry
        )
        self._max_total = Gauge(
            "tgi_batch_max_total_tokens", "Tokens the KV cache holds", registry=registry
        )
        self._next_size = Histogram(
            "tgi_batch_next_size",
            "Sequences that joined the batch in one step",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._steps = self._counter("tgi_batch_inference_count", "Steps", "method", _STEP_KINDS)
        self._steps_done = self._counter(
            "tgi_batch_inference_success", "Steps that succeeded", "method", _STEP_KINDS
        )
        self._steps_failed = self._counter(
            "tgi_batch_inference_failure", "Steps that failed", "method", _STEP_KINDS
        )
        self._step_duration = Histogram(
            "tgi_batch_inference_duration",
            "Time of one step, seconds",
            ["method"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._forward_duration = Histogram(
            "tgi_batch_forward_duration",
            "Time of a step's pass through the decoder, seconds",
            ["method"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._vision_duration = self._seconds(
            "tessera_step_vision_seconds", "Encoding a step's pictures, where it has any"
        )
        self._sample_duration = self._seconds(
            "tessera_step_sample_seconds", "Choosing a step's tokens"
        )
        self._step_tokens = Histogram(
            "tessera_step_tokens",
            "Tokens computed in one step",
            ["method"],
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self._define_cache_metrics()

    def _define_cache_metrics(self) -> None:
        registry = self._registry
        self._cache_used = Gauge(
            "tessera_kv_cache_used_tokens", "Cache tokens held by sequences", registry=registry
        )
        self._cache_kept = Gauge(
            "tessera_kv_cache_kept_tokens",
            "Cache tokens nobody holds whose content can still be found",
            registry=registry,
        )
        self._cache_total = Gauge(
            "tessera_kv_cache_tokens", "Tokens the KV cache holds", registry=registry
        )
        self._feature_tokens = Gauge(
            "tessera_vision_cache_tokens", "Image features on the shards", registry=registry
        )
        self._preemptions = self._counter(
            "tessera_preemptions", "Sequences put back to make room, to be computed again"
        )
        self._prefix_queries = self._counter(
            "tessera_prefix_cache_query_tokens", "Prompt tokens that were let in"
        )
        self._prefix_hits = self._counter(
            "tessera_prefix_cache_hit_tokens", "Those of them that were in the cache"
        )
        self._vision_hits = self._counter(
            "tessera_vision_cache_hits", "Pictures that did not have to be encoded"
        )
        self._vision_misses = self._counter("tessera_vision_cache_misses", "Pictures encoded")

    def request_started(self) -> None:
        """A generation was asked for."""
        self._requests.increase()

    def request_validated(
        self, prompt_tokens: int, max_new_tokens: int, validation_s: float
    ) -> None:
        """A generation was found to be in order, after `validation_s` seconds."""
        self._input_length.observe(prompt_tokens)
        self._max_new.observe(max_new_tokens)
        self._validation.observe(validation_s)

    def request_finished(self, completion: Completion) -> None:
        """A generation completed."""
        timings = completion.timings
        self._successes.increase()
        self._duration.observe(timings.total)
        self._queue.observe(timings.queue)
        self._inference.observe(timings.inference)
        self._per_token.observe(timings.per_token(completion.generated_tokens))
        self._first_token.observe(timings.first_token)
        self._generated.observe(completion.generated_tokens)

    def request_failed(self, kind: FailureKind) -> None:
        """A request ended without completing."""
        self._failures.increase(kind)

    def queue_size(self, requests: int) -> None:
        """So many requests wait."""
        self._queue_size.set(requests)

    def batch_size(self, sequences: int) -> None:
        """So many sequences are being generated."""
        self._batch_size.set(sequences)

    def batch_joined(self, sequences: int) -> None:
        """So many sequences entered the batch with one step."""
        self._next_size.observe(sequences)

    def cache_tokens(self, used: int, kept: int, total: int, features: int) -> None:
        """The KV cache holds `used` of `total` tokens and keeps more; so many image features are
        on the shards."""
        self._batch_tokens.set(used)
        self._max_total.set(total)
        self._cache_used.set(used)
        self._cache_kept.set(kept)
        self._cache_total.set(total)
        self._feature_tokens.set(features)

    def scheduler_counts(self, counts: SchedulerCounts) -> None:
        """What the scheduler has counted so far."""
        self._preemptions.set_total(counts.preemptions)
        self._prefix_queries.set_total(counts.prefix_query_tokens)
        self._prefix_hits.set_total(counts.prefix_hit_tokens)
        self._vision_hits.set_total(counts.vision_hits)
        self._vision_misses.set_total(counts.vision_misses)

    def step(self, kind: StepKind, seconds: float, tokens: int, reply: StepReply) -> None:
        """A step took this long; a step with any prompt chunk in it counts as prefill."""
        self._steps.increase(kind)
        self._steps_done.increase(kind)
        self._step_duration.labels(kind).observe(seconds)
        self._step_tokens.labels(kind).observe(tokens)
        self._forward_duration.labels(kind).observe(reply.forward_ns / 1e9)
        self._sample_duration.observe(reply.sample_ns / 1e9)
        if reply.vision_ns > NOTHING_ENCODED_NS:
            self._vision_duration.observe(reply.vision_ns / 1e9)

    def step_failed(self, kind: StepKind) -> None:
        """A step was lost."""
        self._steps.increase(kind)
        self._steps_failed.increase(kind)

    def render(self) -> bytes:
        """Everything in Prometheus' text format, version 0.0.4."""
        counters = "".join(line for counter in self._counters for line in counter.lines())
        return counters.encode() + generate_latest(_WithoutCreated(self._registry))

    def _counter(
        self, name: str, doc: str, label: str = "", values: Sequence[str] = ("",)
    ) -> "_Counter":
        counter = _Counter(name, doc, label, values)
        self._counters.append(counter)
        return counter

    def _seconds(self, name: str, doc: str) -> Histogram:
        doc = f"{doc}, seconds"
        return Histogram(name, doc, buckets=DURATION_BUCKETS_S, registry=self._registry)

    def _tokens(self, name: str, doc: str, maximum: int) -> Histogram:
        buckets = tuple(maximum * k / 100 for k in range(1, 101))
        return Histogram(name, doc, buckets=buckets, registry=self._registry)


class _Counter:
    """A counter whose name stays as it is. Every label value exists from the start, at 0."""

    def __init__(self, name: str, doc: str, label: str, values: Sequence[str]) -> None:
        self._name, self._doc, self._label = name, doc, label
        self._counts = dict.fromkeys(values, 0)

    def increase(self, value: str = "") -> None:
        self._counts[value] += 1

    def set_total(self, total: int) -> None:
        """For a count that is kept elsewhere."""
        self._counts[""] = total

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self._name} {self._doc}\n# TYPE {self._name} counter\n"
        for value, count in self._counts.items():
            labels = f'{{{self._label}="{value}"}}' if self._label else ""
            yield f"{self._name}{labels} {count}\n"


class _WithoutCreated:
    """The registry's metrics less their creation times, which nobody graphs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
