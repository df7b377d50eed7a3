import re

from prometheus_client.parser import text_string_to_metric_families

from tessera.proto.shard_pb2 import InfoReply, StepReply
from tessera.router.blocks import BlockPool
from tessera.router.generation import ServingLimits
from tessera.router.metrics import Metrics
from tessera.router.request import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    StoppingParams,
    Timings,
)
from tessera.router.scheduler import Scheduler, SchedulerLimits
from tessera.router.sequence import Sequence
from tessera.router.shards import RankState
from tests.router.scrape import metric

TGI_BOUNDS = [0.00015 * 1.5**k for k in range(35)]


def completion(tokens: int = 4) -> Completion:
    timings = Timings(total=2.0, validation=0.25, queue=0.5, inference=1.0, first_token=0.75)
    return Completion(FinishReason.EOS, "x", tokens, None, timings)


def scheduler(num_blocks: int = 40) -> Scheduler:
    return Scheduler(SchedulerLimits(32, 8, 0, 0, 8), BlockPool(num_blocks, 4))


def bounds(metrics: Metrics, name: str) -> list[float]:
    text = metrics.render().decode()
    return [float(b) for b in re.findall(rf'^{name}_bucket{{le="([^"+]+)"', text, re.MULTILINE)]


def test_a_request_that_completes() -> None:
    metrics = Metrics()
    metrics.requests.started()
    metrics.requests.validated(prompt_tokens=7, max_new_tokens=20)
    metrics.requests.first_step(0.5, prompt=7, cached=4, image=2)
    metrics.requests.first_token(1.0)
    metrics.requests.next_token(0.125)
    metrics.requests.finished(completion(tokens=4))
    expected = {
        "tgi_request_count": 1,
        "tgi_request_success": 1,
        "tgi_request_failure": 0,
        'tessera_request_success_total{finished_reason="eos_token"}': 1,
        'tessera_request_success_total{finished_reason="length"}': 0,
        "tgi_request_duration_sum": 2.0,
        "tgi_request_validation_duration_sum": 0.25,
        "tgi_request_queue_duration_sum": 0.5,
        "tgi_request_inference_duration_sum": 1.0,
        "tgi_request_mean_time_per_token_duration_sum": 0.25,
        "tgi_request_input_length_sum": 7,
        "tgi_request_max_new_tokens_sum": 20,
        "tgi_request_generated_tokens_sum": 4,
        "tgi_request_skipped_tokens_sum": 0,
        "tgi_request_skipped_tokens_count": 1,
        "tessera_time_to_first_token_seconds_sum": 1.0,
        "tessera_inter_token_latency_seconds_sum": 0.125,
        "tessera_request_queue_time_seconds_sum": 0.5,
        "tessera_request_prefill_time_seconds_sum": 0.25,
        "tessera_request_decode_time_seconds_sum": 0.75,
        "tessera_prompt_tokens_total": 7,
        "tessera_prompt_tokens_cached_total": 4,
        "tessera_image_tokens_total": 2,
        "tessera_generation_tokens_total": 2,
    }
    assert {name: metric(metrics, name) for name in expected} == expected


def test_every_failure_kind_exists_before_it_happens() -> None:
    metrics = Metrics()
    for kind in ("validation", "overloaded", "generation", "incomplete", "template", "dropped"):
        assert metric(metrics, f'tgi_request_failure{{err="{kind}"}}') == 0
    metrics.requests.failed("overloaded")
    assert metric(metrics, 'tgi_request_failure{err="overloaded"}') == 1
    assert metric(metrics, "tgi_request_failure") == 1


def test_a_step_and_where_its_time_went() -> None:
    metrics = Metrics()
    reply = StepReply(vision_ns=500_000_000, forward_ns=250_000_000, sample_ns=125_000_000)
    metrics.steps.answered("mixed", 1.0, 300, 2, reply)
    metrics.steps.answered("decode", 0.125, 4, 0, StepReply(vision_ns=1000))
    metrics.steps.answered("release", 0.25, 0, 0, StepReply(vision_ns=1000))
    metrics.steps.taken("decode", 0.5)
    metrics.steps.taken("release", 0.5)
    metrics.steps.lost("release")
    metrics.steps.lost("decode")
    expected = {
        'tessera_step_tokens_sum{method="prefill"}': 300,
        'tessera_step_tokens_sum{method="decode"}': 4,
        'tgi_batch_inference_count{method="prefill"}': 1,
        'tgi_batch_inference_count{method="decode"}': 2,
        'tgi_batch_inference_success{method="decode"}': 1,
        'tgi_batch_inference_failure{method="decode"}': 1,
        'tgi_batch_inference_failure{method="prefill"}': 0,
        'tgi_batch_inference_duration_sum{method="prefill"}': 1.0,
        'tgi_batch_forward_duration_sum{method="prefill"}': 0.25,
        'tgi_batch_decode_duration_sum{method="prefill"}': 0.125,
        'tgi_batch_filter_duration_sum{method="decode"}': 0.5,
        'tessera_step_duration_seconds_sum{kind="mixed"}': 1.0,
        'tessera_step_duration_seconds_sum{kind="release"}': 0.25,
        'tessera_step_duration_seconds_count{kind="prefill"}': 0,
        "tessera_image_encode_seconds_sum": 0.5,
        "tessera_image_encode_seconds_count": 1,  # the other had no picture
    }
    assert {name: metric(metrics, name) for name in expected} == expected


def test_who_joins_whom() -> None:
    metrics, policy = Metrics(), scheduler()
    request = Request(tuple(range(5)), (), SamplingParams(), StoppingParams(9))

    def plan_with(*sequence_ids: int) -> None:
        for sequence_id in sequence_ids:
            policy.add(Sequence(sequence_id, request))
        metrics.steps.planned(policy.next_step(), 0.25)

    plan_with(1, 2)  # they find nobody
    assert metric(metrics, "tgi_batch_concat") == 0
    plan_with()
    plan_with(3)
    assert metric(metrics, 'tgi_batch_concat{reason="chunking"}') == 1
    assert metric(metrics, 'tgi_batch_concat_duration_sum{method="decode"}') == 0.25
    assert metric(metrics, "tgi_batch_next_size_count") == 2
    assert metric(metrics, "tgi_batch_next_size_sum") == 3


def test_how_full_it_is_is_read_when_asked() -> None:
    metrics, policy = Metrics(), scheduler(num_blocks=40)
    assert metric(metrics, "tessera_kv_cache_tokens") == 0  # the warm-up is not over
    metrics.open(ServingLimits(100, 200, 32, 160, 8), policy)
    for sequence_id in (1, 2):
        policy.add(
            Sequence(
                sequence_id,
                Request(tuple(range(20)), (), SamplingParams(), StoppingParams(9)),
            )
        )
    expected = {"tgi_queue_size": 2, "tgi_batch_current_size": 0, "tessera_kv_cache_usage_perc": 0}
    assert {name: metric(metrics, name) for name in expected} == expected
    policy.next_step()
    policy.counts.preemptions, policy.counts.vision_hits, policy.counts.vision_misses = 1, 2, 3
    expected = {
        "tgi_queue_size": 0,
        "tessera_num_requests_waiting": 0,
        "tgi_batch_current_size": 2,
        "tessera_num_requests_running": 2,
        "tessera_kv_cache_used_tokens": 24,  # four full blocks are shared
        "tgi_batch_current_max_tokens": 24,
        "tessera_kv_cache_usage_perc": 24 / 160,
        "tessera_kv_cache_tokens": 160,
        "tgi_batch_max_total_tokens": 160,
        "tessera_prefix_cache_queries_total": 40,
        "tessera_prefix_cache_hits_total": 16,
        "tessera_num_preemptions_total": 1,
        "tessera_vision_cache_hits_total": 2,
        "tessera_vision_cache_misses_total": 3,
        'tessera_cache_config_info{block_size="4",num_gpu_blocks="40"}': 1,
    }
    assert {name: metric(metrics, name) for name in expected} == expected


def test_buckets_are_those_of_text_generation_inference() -> None:
    metrics = Metrics()
    metrics.open(ServingLimits(300, 500, 32, 160, 8), scheduler())
    for name in ("tgi_request_duration", "tgi_request_queue_duration"):
        assert bounds(metrics, name) == TGI_BOUNDS
    assert bounds(metrics, "tgi_request_input_length") == [3.0 * k for k in range(1, 101)]
    assert bounds(metrics, "tgi_request_generated_tokens") == [5.0 * k for k in range(1, 101)]
    assert bounds(metrics, "tgi_request_max_new_tokens") == [5.0 * k for k in range(1, 101)]


def test_each_rank_as_it_is_known() -> None:
    metrics = Metrics()
    ranks = [RankState(), RankState()]
    metrics.ranks.follow(ranks)
    assert metric(metrics, 'tessera_shard_up{rank="1"}') == 0
    info = InfoReply(device="cpu", backend="cpu", dtype="float32", used_memory_bytes=77)
    ranks[1].info, ranks[1].answers = info, True
    assert metric(metrics, 'tessera_shard_up{rank="0"}') == 0
    assert metric(metrics, 'tessera_shard_up{rank="1"}') == 1
    assert metric(metrics, 'tessera_shard_memory_bytes{rank="1"}') == 77
    name = 'tessera_shard_info{backend="cpu",device="cpu",dtype="float32",rank="1"}'
    assert metric(metrics, name) == 1


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.requests.started()
    assert (metric(first, "tgi_request_count"), metric(second, "tgi_request_count")) == (1, 0)


def test_the_format_is_prometheus() -> None:
    metrics = Metrics()
    metrics.server.describe("1.2.3", "a/model", None)
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    assert families["tgi_request_count"].type == "counter"
    assert families["tgi_request_skipped_tokens"].type == "histogram"
    assert families["tgi_queue_size"].type == "gauge"
    assert families["tessera_generation_tokens"].type == "counter"  # the parser drops `_total`
    assert families["tessera_build_info"].samples[0].labels["version"] == "1.2.3"
    assert families["process_start_time_seconds"].samples[0].value > 1e9


def test_counters_have_the_names_dashboards_read() -> None:
    named = [one.name for one in Metrics().descriptions]
    assert not [name for name in named if name.startswith("tgi_") and name.endswith("_total")]
    counters = [
        one.name
        for one in Metrics().descriptions
        if one.kind == "counter" and one.name.startswith("tessera_")
    ]
    assert counters and all(name.endswith("_total") for name in counters)
