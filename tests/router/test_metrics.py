from prometheus_client.parser import text_string_to_metric_families

from tessera.proto.shard_pb2 import StepReply
from tessera.router.metrics import Metrics
from tessera.router.request import Completion, FinishReason, Timings
from tessera.router.scheduler import SchedulerCounts

# What the dashboards of the servers this one replaces read.
DASHBOARD_NAMES = [
    "tgi_batch_concat_duration_bucket",
    "tgi_batch_current_max_tokens",
    "tgi_batch_current_size",
    "tgi_batch_inference_duration_bucket",
    "tgi_queue_size",
    "tgi_request_count",
    "tgi_request_duration_bucket",
    "tgi_request_failure",
    "tgi_request_generated_tokens_bucket",
    "tgi_request_inference_duration_bucket",
    "tgi_request_input_length_bucket",
    "tgi_request_max_new_tokens_bucket",
    "tgi_request_mean_time_per_token_duration_bucket",
    "tgi_request_queue_duration_bucket",
    "tgi_request_success",
    "tgi_request_validation_duration_bucket",
    "tgi_batch_next_size_bucket",
    "tgi_batch_inference_count",
    "tessera_time_to_first_token_seconds_bucket",
]


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Value by (name, the one label's value)."""
    found = {}
    for line in metrics.render().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name, _, label = name.partition("{")
            found[name, label.rstrip('}"').rpartition('"')[2]] = float(value)
    return found


def completion(tokens: int = 4) -> Completion:
    timings = Timings(total=2.0, validation=0.25, queue=0.5, inference=1.0, first_token=0.75)
    return Completion(FinishReason.EOS, "x", tokens, None, timings)


def test_counters_have_the_names_dashboards_read() -> None:
    metrics = Metrics()
    metrics.step("prefill", 0.1, 7, StepReply())
    metrics.step("decode", 0.1, 1, StepReply())
    names = {name for name, _ in samples(metrics)}
    assert set(DASHBOARD_NAMES) - {"tgi_batch_concat_duration_bucket"} <= names
    assert not [name for name in names if name.endswith(("_total", "_created"))]


def test_every_failure_kind_exists_before_it_happens() -> None:
    found = samples(Metrics())
    for kind in ("validation", "overloaded", "generation", "incomplete", "template", "dropped"):
        assert found["tgi_request_failure", kind] == 0


def test_a_request_that_completes() -> None:
    metrics = Metrics()
    metrics.request_started()
    metrics.request_validated(prompt_tokens=7, max_new_tokens=20, validation_s=0.25)
    metrics.request_finished(completion(tokens=4))
    found = samples(metrics)
    assert found["tgi_request_count", ""] == found["tgi_request_success", ""] == 1
    assert found["tgi_request_input_length_sum", ""] == 7
    assert found["tgi_request_max_new_tokens_sum", ""] == 20
    assert found["tgi_request_generated_tokens_sum", ""] == 4
    assert found["tgi_request_duration_sum", ""] == 2.0
    assert found["tgi_request_mean_time_per_token_duration_sum", ""] == 0.25
    assert found["tessera_time_to_first_token_seconds_sum", ""] == 0.75


def test_failures_and_gauges() -> None:
    metrics = Metrics()
    metrics.request_failed("overloaded")
    metrics.queue_size(3)
    metrics.batch_size(2)
    metrics.step_failed("decode")
    found = samples(metrics)
    assert found["tgi_request_failure", "overloaded"] == 1
    assert (found["tgi_queue_size", ""], found["tgi_batch_current_size", ""]) == (3, 2)
    assert found["tgi_batch_inference_failure", "decode"] == 1
    assert found["tgi_batch_inference_success", "decode"] == 0


def test_a_step_and_where_its_time_went() -> None:
    metrics = Metrics()
    reply = StepReply(vision_ns=500_000_000, forward_ns=250_000_000, sample_ns=125_000_000)
    metrics.step("prefill", 1.0, 300, reply)
    metrics.step("decode", 0.1, 4, StepReply(vision_ns=1000))
    found = samples(metrics)
    assert found["tessera_step_tokens_sum", "prefill"] == 300
    assert found["tessera_step_tokens_sum", "decode"] == 4
    assert found["tgi_batch_forward_duration_sum", "prefill"] == 0.25
    assert found["tessera_step_sample_seconds_sum", ""] == 0.125
    assert found["tessera_step_vision_seconds_sum", ""] == 0.5
    assert found["tessera_step_vision_seconds_count", ""] == 1  # the other had no picture


def test_caches_and_what_the_scheduler_counted() -> None:
    metrics = Metrics()
    metrics.cache_tokens(used=32, kept=16, total=640, features=78)
    metrics.scheduler_counts(SchedulerCounts(1, 100, 64, 2, 3))
    metrics.scheduler_counts(SchedulerCounts(2, 200, 128, 4, 6))
    found = samples(metrics)
    assert found["tessera_kv_cache_used_tokens", ""] == 32
    assert found["tgi_batch_current_max_tokens", ""] == 32
    assert found["tessera_kv_cache_kept_tokens", ""] == 16
    assert found["tessera_kv_cache_tokens", ""] == found["tgi_batch_max_total_tokens", ""] == 640
    assert found["tessera_vision_cache_tokens", ""] == 78
    assert found["tessera_preemptions", ""] == 2
    assert found["tessera_prefix_cache_query_tokens", ""] == 200
    assert found["tessera_prefix_cache_hit_tokens", ""] == 128
    assert found["tessera_vision_cache_misses", ""] == 4
    assert found["tessera_vision_cache_hits", ""] == 6


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.request_started()
    assert samples(first)["tgi_request_count", ""] == 1
    assert samples(second)["tgi_request_count", ""] == 0


def test_the_format_is_prometheus() -> None:
    metrics = Metrics(max_input_tokens=100)
    metrics.step("decode", 0.1, 1, StepReply())
    families = list(text_string_to_metric_families(metrics.render().decode()))
    types = {family.name: family.type for family in families}
    assert types["tgi_request_count"] == "counter"
    assert types["tgi_request_duration"] == "histogram"
    assert types["tgi_queue_size"] == "gauge"
