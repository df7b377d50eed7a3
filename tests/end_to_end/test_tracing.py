"""Traces and logs of the whole stack, as a collector and a reader of the log get them."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.end_to_end.asking import Body, endless, png, question, streaming
from tests.end_to_end.stack import Stack, running
from tests.otlp_sink import Sink, Span, otlp_sink

pytestmark = pytest.mark.timeout(300)

KEY, PROMPT = "sesame-open", "Unspeakable"
AUTHORIZATION = {"authorization": f"Bearer {KEY}"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARTS = ["validation", "queue", "prefill", "decode"]
NUM_TOGETHER = 10


@pytest.fixture(scope="module")
def sink() -> Iterator[Sink]:
    with otlp_sink() as one:
        yield one


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path], sink: Sink) -> Iterator[Stack]:
    """A cache in which few sequences have room, so that some are preempted."""
    flags = ["--num-shard", "2", "--dtype", "float32", "--max-total-tokens", "320"]
    flags += ["--max-batch-total-tokens", "320", "--max-batch-prefill-tokens", "32"]
    flags += ["--otlp-endpoint", sink.address, "--json-output", "--api-key", KEY]
    flags += ["--max-shard-restarts", "0"]
    environ = {"OTEL_TRACES_SAMPLER": "always_off", "OTEL_RESOURCE_ATTRIBUTES": "a=b"}
    with running(checkpoint("next-mistral"), *flags, **environ) as one:
        yield one


async def generate(client: Any, request_id: str, inputs: str, **headers: str) -> None:
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 40, "decoder_input_details": False}}
    named = {"x-request-id": request_id, **AUTHORIZATION, **headers}
    reply = await client.post("/generate", json=body, headers=named)
    assert reply.status_code == 200, reply.text


def ask_all(stack: Stack, prompts: dict[str, str], **headers: str) -> None:
    """Send prompts at once, each under its request id."""

    async def go() -> None:
        async with stack.client() as client:
            await asyncio.gather(*(generate(client, i, p, **headers) for i, p in prompts.items()))

    asyncio.run(go())


def line_of(stack: Stack, request_id: str) -> dict[str, Any]:
    """The log's line about a request."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        events = [json.loads(line) for line in list(stack.lines) if line.startswith("{")]
        if found := [one for one in events if one.get("request_id") == request_id]:
            (event,) = found
            return event
        time.sleep(0.05)
    raise AssertionError(f"no line about {request_id}:\n{stack.log}")


def assert_line_and_trace_agree(event: dict[str, Any], root: Span) -> None:
    assert event["trace_id"] == root.trace_id
    assert event["prompt_tokens"] == root.attributes["gen_ai.usage.input_tokens"]
    assert event["image_tokens"] == root.attributes["tessera.usage.image_tokens"]
    assert event["generated_tokens"] == root.attributes["gen_ai.usage.output_tokens"]
    seconds = (root.end_ns - root.start_ns) / 1e9
    assert 0 < event["validation_s"] < event["first_token_s"] < event["total_s"] <= seconds


def test_a_picture_s_way_from_the_client_through_the_shards(stack: Stack, sink: Sink) -> None:
    ask_all(
        stack,
        {"picture": question(1, (112, 56)) + PROMPT},
        traceparent=f"00-{TRACE}-{PARENT}-01",
    )
    trace = sink.trace_of("picture")
    root = trace[""]
    assert (root.trace_id, root.parent_id) == (TRACE, PARENT)
    assert root.name == "POST /generate" and root.is_server and not root.is_error
    spans = [trace[name] for name in PARTS]
    assert all(span.parent_id == root.span_id for span in spans)
    assert trace["decode pictures"].parent_id == trace["validation"].span_id
    for before, after in pairwise(spans):
        assert before.end_ns <= after.start_ns + 1_000_000  # rounding
    prefill, decode = trace["prefill"].attributes, trace["decode"].attributes
    chunks = -(-root.attributes["gen_ai.usage.input_tokens"] // 32)
    assert prefill["tessera.steps"] >= chunks > 1
    assert prefill["tessera.shard.vision_s"] > 0
    assert prefill["tessera.shard.forward_s"] > 0
    assert decode["tessera.steps"] >= root.attributes["gen_ai.usage.output_tokens"] - 1
    seconds = (trace["prefill"].end_ns - trace["prefill"].start_ns) / 1e9
    assert prefill["tessera.shard.vision_s"] + prefill["tessera.shard.forward_s"] < seconds
    event = line_of(stack, "picture")
    assert (event["child"], event["level"], event["status"]) == ("router", "INFO", 200)
    assert event["image_tokens"] > 0
    assert event["finish_reason"] == root.attributes["gen_ai.response.finish_reasons"][0]
    assert_line_and_trace_agree(event, root)
    assert root.resource["service.name"] == "text-generation-inference.router"
    assert "a" not in root.resource


def test_preempted_requests_say_so(stack: Stack, sink: Sink) -> None:
    prompts = {f"crowd-{n}": question(10 + n) for n in range(NUM_TOGETHER)}
    ask_all(stack, prompts)
    decodes = [sink.trace_of(name).get("decode") for name in prompts]
    preempted = [one for one in decodes if one is not None and "preempted" in one.events]
    assert preempted, "the cache is not small enough for this test"
    for span in preempted:
        assert span.attributes["tessera.preemptions"] == span.events.count("preempted")
        assert span.attributes["tessera.shard.forward_s"] > 0


def test_a_client_that_leaves(stack: Stack, sink: Sink) -> None:
    async def go() -> None:
        body = endless("go on", 250)
        headers = {"x-request-id": "left", **AUTHORIZATION}
        async with stack.client() as client, streaming(client, body, **headers) as events:
            await anext(events)

    asyncio.run(go())
    root = sink.trace_of("left")[""]
    assert root.attributes["error.type"] == "cancelled" and not root.is_error
    assert line_of(stack, "left")["error_type"] == "cancelled"


def test_a_request_that_is_refused(stack: Stack, sink: Sink) -> None:
    body: Body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 100_000}}
    headers = {"x-request-id": "refused", **AUTHORIZATION}

    async def go() -> None:
        async with stack.client() as client:
            assert (await client.post("/generate", json=body, headers=headers)).status_code == 422

    asyncio.run(go())
    root = sink.trace_of("refused")[""]
    assert root.attributes["error.type"] == "validation" and not root.is_error
    event = line_of(stack, "refused")
    assert (event["level"], event["status"], event["error_type"]) == ("INFO", 422, "validation")


def send_secrets(stack: Stack) -> list[str]:
    """Requests that succeed, are refused and are no requests; what nobody may read afterwards."""
    picture = png(30, 20, seed=9)
    prompt = f"![](data:image/png;base64,{picture}){PROMPT}"
    bodies: list[Body] = [
        {"inputs": prompt, "parameters": {"max_new_tokens": 3, "stop": ["Stop-word"]}},
        {"inputs": prompt, "parameters": {"max_new_tokens": 3, "grammar": {"value": PROMPT}}},
        {"inputs": prompt, "parameters": {"top_p": PROMPT}},
        {"inputs": f"![](data:image/png;base64,{picture[:40]}){PROMPT}"},
        {"inputs": f"![](http://127.0.0.1:9/{PROMPT}.png)"},
        {PROMPT: PROMPT},
    ]
    headers = {**AUTHORIZATION, "cookie": "c00kie", "traceparent": PROMPT, "x-request-id": "secret"}
    with httpx.Client(base_url=stack.url, timeout=60, verify=False) as client:
        replies = [client.post("/generate", json=body, headers=headers) for body in bodies]
        replies.append(client.post(f"/{PROMPT}", json={}, headers=headers))
        guess = {"authorization": "Bearer gu3ss"}
        replies.append(client.post(f"/generate?key={KEY}", json=bodies[0], headers=guess))
        replies.append(client.post("/generate", content=PROMPT, headers=headers))
    assert [reply.status_code for reply in replies] == [200, *[422] * 5, 404, 401, 400]
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{PROMPT}\r\n{KEY}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    return [KEY, PROMPT, "Stop-word", "c00kie", "gu3ss", picture[:30], picture[-30:]]


def test_neither_the_log_nor_the_traces_hold_a_secret(stack: Stack, sink: Sink) -> None:
    secrets = send_secrets(stack)
    ask_all(stack, {"behind": "x"})
    sink.trace_of("behind")
    line_of(stack, "behind")
    assert any("API_KEY=..." in line for line in stack.lines)
    events = [json.loads(line) for line in stack.lines]
    assert all(isinstance(event, dict) for event in events)
    assert {"router", "shard 0", "shard 1"} <= {event.get("child") for event in events}
    assert len([event for event in events if event.get("request_id") == "secret"]) == 8
    for secret in secrets:
        assert secret not in stack.log
        assert secret.encode() not in b"".join(sink.received)


def test_the_log_as_text_holds_no_secret_either(checkpoint: Callable[[str], Path]) -> None:
    flags = ["--dtype", "float32", "--max-total-tokens", "320", "--api-key", KEY]
    with running(checkpoint("next-mistral"), *flags, LOG_LEVEL="debug") as stack:
        secrets = send_secrets(stack)
        ask_all(stack, {"behind": "x"})
        deadline = time.monotonic() + 20
        while "request_id=behind" not in stack.log and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len([line for line in stack.lines if "request_id=secret" in line]) == 8
    for secret in secrets:
        assert secret not in stack.log
    assert "generated_tokens=3" in stack.log and "finish_reason=length" in stack.log
    assert "param=top_p" in stack.log or "param=parameters.top_p" in stack.log


def test_a_lost_shard_is_told_before_all_ends(stack: Stack, sink: Sink) -> None:
    """The last test: nothing is left of the stack after it."""
    headers = {"x-request-id": "lost", **AUTHORIZATION}

    async def go() -> None:
        body = endless("go on", 250)
        async with stack.client() as client, streaming(client, body, **headers) as events:
            await anext(events)
            children = psutil.Process(stack.process.pid).children(recursive=True)
            shards = [one for one in children if "tessera.shard.main" in one.cmdline()]
            assert len(shards) == 2
            shards[1].kill()
            assert "error" in [event async for event in events][-1]

    asyncio.run(go())
    trace = sink.trace_of("lost")
    assert trace[""].is_error and trace["decode"].is_error
    assert trace[""].attributes["error.type"] == "generation"
    assert stack.process.wait(30) == 1
    assert line_of(stack, "lost")["level"] == "ERROR"
