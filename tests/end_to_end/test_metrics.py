"""Known work, and what /metrics says of it afterwards, number by number."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.stack import Stack, running
from tests.router.scrape import metric

pytestmark = pytest.mark.timeout(300)

PICTURE = Path(__file__).parents[2] / "launcher" / "demo" / "picture.png"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running(None, "--num-shard", "2") as stack:
        yield stack


def scrape(stack: Stack) -> str:
    return httpx.get(f"{stack.url}/metrics", verify=False).text


def ask(stack: Stack, path: str, body: Any, status: int = 200) -> Any:
    reply = stack.post(path, body)
    assert reply.status_code == status, reply.text
    return reply.json()


def chat_about_a_picture(stack: Stack) -> dict[str, Any]:
    """A stream; returns its usage."""
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "How many shapes are there?"},
    ]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reply = stack.post("/v1/chat/completions", body)
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    usage: dict[str, Any] = json.loads(events[-1])["usage"]
    return usage


def test_known_work_is_counted_exactly(stack: Stack) -> None:
    before = scrape(stack)
    usages = [chat_about_a_picture(stack), chat_about_a_picture(stack)]
    body = {"prompt": ["[INST] a [/INST]", "[INST] b [/INST]"], "n": 2, "max_tokens": 5}
    usages.append(ask(stack, "/v1/completions", body | {"temperature": 1.0})["usage"])
    one = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
    details = ask(stack, "/generate", {"inputs": "go on", "parameters": one})["details"]
    ask(stack, "/generate", {"inputs": "x", "parameters": {"temperature": -1}}, 422)
    ask(stack, "/v1/chat/completions", {"messages": [], "max_tokens": 1}, 422)
    ask(stack, "/v1/nowhere", {}, 404)
    stack.wait_metric("tgi_batch_current_size", 0)
    after = scrape(stack)

    generated = sum(usage["completion_tokens"] for usage in usages) + details["generated_tokens"]
    # n answers share a prompt that `usage` counts once and the scheduler once each.
    prompts = usages[0]["prompt_tokens"] + usages[1]["prompt_tokens"]
    prompts += 2 * usages[2]["prompt_tokens"] + len(details["prefill"])
    images = 2 * usages[0]["prompt_tokens_details"]["image_tokens"]
    finished = 2 + 4 + 1
    expected = {
        "tgi_request_count": finished + 2,
        "tgi_request_success": finished,
        "tessera_request_success_total": finished,
        'tgi_request_failure{err="validation"}': 2,
        "tgi_request_failure": 2,
        "tgi_request_generated_tokens_sum": generated,
        "tgi_request_input_length_sum": prompts,
        "tgi_request_skipped_tokens_sum": 0,
        "tessera_generation_tokens_total": generated,
        "tessera_prompt_tokens_total": prompts,
        "tessera_image_tokens_total": images,
        "tessera_inter_token_latency_seconds_count": generated - finished,
        "tessera_prefix_cache_queries_total": prompts,
        "tessera_num_preemptions_total": 0,
        "tessera_image_decode_seconds_count": 2,
        "tessera_image_fetch_seconds_count": 0,
        "tessera_image_encode_seconds_count": 1,
        "tessera_vision_cache_misses_total": 1,
        "tessera_vision_cache_hits_total": 1,
        "tgi_batch_next_size_sum": finished,
        "tgi_batch_inference_failure": 0,
        http("POST", "/v1/chat/completions", 200): 2,
        http("POST", "/v1/completions", 200): 1,
        http("POST", "/generate", 200): 1,
        http("POST", "/generate", 422): 1,
        http("POST", "/v1/chat/completions", 422): 1,
        http("POST", "other", 404): 1,
    }
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration"):
        expected[f"tgi_request_{name}_count"] = finished
    for name in ("mean_time_per_token_duration", "generated_tokens", "max_new_tokens"):
        expected[f"tgi_request_{name}_count"] = finished
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
        expected[f"tessera_{name}_seconds_count"] = finished
    assert {name: difference(before, after, name) for name in expected} == expected
    cached = difference(before, after, "tessera_prompt_tokens_cached_total")
    assert cached == difference(before, after, "tessera_prefix_cache_hits_total")
    assert cached >= usages[1]["prompt_tokens_details"]["cached_tokens"] > 0


def test_steps_add_up(stack: Stack) -> None:
    """Every token of a prompt is computed once unless it was cached, every other but the last."""
    before = scrape(stack)
    parameters = {"max_new_tokens": 20, "details": True}
    reply = ask(stack, "/generate", {"inputs": "once upon a time", "parameters": parameters})
    stack.wait_metric("tgi_batch_current_size", 0)
    after = scrape(stack)
    tokens = difference(before, after, "tessera_prompt_tokens_total")
    tokens -= difference(before, after, "tessera_prompt_tokens_cached_total")
    tokens += reply["details"]["generated_tokens"] - 1
    # The step that was sent before the end was known computes one more.
    assert difference(before, after, "tessera_step_tokens_sum") - tokens in (0, 1)
    steps = difference(before, after, "tgi_batch_inference_count")
    for name in ("inference_success", "inference_duration_count", "forward_duration_count"):
        assert difference(before, after, f"tgi_batch_{name}") == steps
    for name in ("decode_duration_count", "filter_duration_count"):
        assert difference(before, after, f"tgi_batch_{name}") == steps


def test_shards_and_the_server_are_described(stack: Stack) -> None:
    text = scrape(stack)
    for rank in range(2):
        assert metric(text, f'tessera_shard_up{{rank="{rank}"}}') == 1
        assert metric(text, f'tessera_shard_memory_bytes{{rank="{rank}"}}') > 10 * 2**20
    assert metric(text, "tessera_shard_info") == 2
    assert metric(text, "tessera_build_info") == metric(text, "tessera_model_info") == 1
    assert metric(text, "process_resident_memory_bytes") > 10 * 2**20
    usage = metric(text, "tessera_kv_cache_used_tokens") / metric(text, "tessera_kv_cache_tokens")
    assert metric(text, "tessera_kv_cache_usage_perc") == usage


def http(method: str, route: str, status: int) -> str:
    labels = f'method="{method}",route="{route}",status="{status}"'
    return f"tessera_http_requests_total{{{labels}}}"


def difference(before: str, after: str, name: str) -> float:
    started = metric(before, name) if name.partition("}")[0] in before else 0
    return metric(after, name) - started
