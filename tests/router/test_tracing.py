"""Traces of requests, as a collector gets them."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from starlette.applications import Starlette
from starlette.datastructures import Headers

from tessera.proto import shard_pb2
from tessera.proto.env import SettingsError, read_settings
from tessera.router.app import create_app
from tessera.router.errors import GenerationError, OverloadedError
from tessera.router.metrics import Metrics
from tessera.router.model_files import ModelFiles
from tessera.router.request import FinishReason, Request, SamplingParams, StoppingParams
from tessera.router.request_record import RequestRecord
from tessera.router.settings import RouterSettings
from tessera.router.tracing import OtlpExporter, Tracing
from tests.end_to_end.asking import png
from tests.otlp_sink import Sink, otlp_sink
from tests.router.http_fakes import FakeGenerator, FakeStream, Script, call, disconnecting, post

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
ONE = {"x-request-id": "one"}
BODY = {"inputs": "Private words", "parameters": {"max_new_tokens": 3}}

MakeApp = Callable[..., Starlette]


@pytest.fixture
def sink() -> Iterator[Sink]:
    with otlp_sink() as one:
        yield one


@pytest.fixture
def tracing(sink: Sink) -> Iterator[Tracing]:
    one = Tracing(OtlpExporter(sink.address), "our.name", "1.2.3")
    yield one
    one.close()


@pytest.fixture
def traced_app(tracing: Tracing, checkpoint: Callable[[str], Path], make_validator: Any) -> MakeApp:
    def make(
        generator: FakeGenerator | None = None, kind: str = "llama", **settings: Any
    ) -> Starlette:
        generator = generator or FakeGenerator()
        metrics = Metrics()
        validator = make_validator(kind, generator, metrics, **settings)
        files = ModelFiles.read(checkpoint(kind))
        options = RouterSettings(**settings)
        return create_app(options, generator, validator, files, metrics, tracing)

    return make


def test_without_a_collector_nothing_is_imported() -> None:
    program = "import sys, tessera.router.main; print([m for m in sys.modules if 'telemetry' in m])"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "bad", ["localhost:4317", "http://host", "http://host:1/v1/traces", "http://a:b@host:1", "grpc"]
)
def test_an_address_that_cannot_be_is_refused_at_the_start(bad: str) -> None:
    with pytest.raises(SettingsError, match="http://localhost:4317"):
        read_settings(RouterSettings, {"OTLP_ENDPOINT": bad})


def test_a_generation_is_a_span_with_its_parts(traced_app: MakeApp, sink: Sink) -> None:
    reply = post(traced_app(served_model_name="org/model"), "/generate", BODY, headers=ONE)
    assert reply.status_code == 200
    trace = sink.trace_of("one")
    root = trace.pop("")
    assert set(trace) == {"POST /generate", "validation", "queue", "prefill", "decode"}
    assert root.is_server and root.parent_id == "" and not root.is_error
    for part in ("validation", "queue", "prefill", "decode"):
        span = trace[part]
        assert (span.parent_id, span.trace_id) == (root.span_id, root.trace_id)
        assert root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns
        assert not span.is_server and not span.is_error and "error.type" not in span.attributes
    order = [trace[part] for part in ("validation", "queue", "prefill", "decode")]
    assert [s.start_ns for s in order] == sorted(s.start_ns for s in order)
    prompt_tokens = root.attributes.pop("gen_ai.usage.input_tokens")
    assert prompt_tokens > 2
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "tessera.request_id": "one",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tessera",
        "gen_ai.request.model": "org/model",
        "gen_ai.response.model": "org/model",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "tessera.usage.image_tokens": 0,
    }
    assert root.resource["service.name"] == "our.name"
    assert root.resource["service.version"] == "1.2.3"


def test_pictures_are_parts_of_the_validation(traced_app: MakeApp, sink: Sink) -> None:
    picture = f"data:image/png;base64,{png(40, 30, seed=1)}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    reply = post(traced_app(kind="next-mistral"), "/v1/chat/completions", body, headers=ONE)
    assert reply.status_code == 200, reply.text
    trace = sink.trace_of("one")
    assert trace[""].attributes["gen_ai.operation.name"] == "chat"
    assert trace[""].attributes["tessera.usage.image_tokens"] > 0
    validation = trace["validation"]
    for part in ("read pictures", "decode pictures"):
        assert trace[part].parent_id == validation.span_id
        assert validation.start_ns <= trace[part].start_ns <= trace[part].end_ns
        assert trace[part].end_ns <= validation.end_ns


def test_a_picture_that_cannot_be_read_fails_its_part(traced_app: MakeApp, sink: Sink) -> None:
    body = {"inputs": "![](data:image/png;base64,AAAA)what?"}
    assert post(traced_app(kind="next-mistral"), "/generate", body, headers=ONE).status_code == 422
    trace = sink.trace_of("one")
    assert "queue" not in trace
    for part in ("read pictures", "validation", ""):
        assert trace[part].attributes["error.type"] == "validation"
        assert not trace[part].is_error  # the client's


@pytest.mark.parametrize("state", ["", "vendor=value,other=1"])
def test_a_client_s_trace_goes_on(traced_app: MakeApp, sink: Sink, state: str) -> None:
    headers = ONE | {"traceparent": SAMPLED} | ({"tracestate": state} if state else {})
    post(traced_app(), "/generate", BODY, headers=headers)
    root = sink.trace_of("one")[""]
    assert (root.trace_id, root.parent_id, root.trace_state) == (TRACE, PARENT, state)


@pytest.mark.parametrize(
    "parents",
    [
        ["nonsense"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"ff-{TRACE}-{PARENT}-01"],
        [SAMPLED, SAMPLED],
        ["\xe9" * 1000],
    ],
)
def test_a_malformed_parent_counts_as_none(
    traced_app: MakeApp, sink: Sink, parents: list[str]
) -> None:
    headers = [(b"x-request-id", b"one"), *((b"traceparent", p.encode("latin-1")) for p in parents)]
    assert call(traced_app(), "POST", "/generate", json=BODY, headers=headers).status_code == 200
    root = sink.trace_of("one")[""]
    assert root.parent_id == "" and root.trace_id != TRACE


def test_what_the_client_does_not_sample_is_not_sent(traced_app: MakeApp, sink: Sink) -> None:
    app = traced_app()
    unsampled = {"x-request-id": "quiet", "traceparent": UNSAMPLED}
    post(app, "/generate", BODY, headers=unsampled)
    post(app, "/generate", BODY, headers=ONE)
    sink.trace_of("one")  # sent after it
    assert not [span for span in sink.spans if span.trace_id == TRACE]


def test_the_environment_has_no_say(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_SERVICE_NAME": "other",
        "OTEL_RESOURCE_ATTRIBUTES": "secret=1",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "false",
    }.items():
        monkeypatch.setenv(name, value)
    tracing = Tracing(OtlpExporter(sink.address), "our.name", "1")
    trace = tracing.begin(_headers())
    trace.end(record("one"))
    root = sink.trace_of("one")[""]
    tracing.close()
    assert root.resource["service.name"] == "our.name" and "secret" not in root.resource
    assert len(root.attributes) > 1


def test_probes_have_no_trace(traced_app: MakeApp, sink: Sink) -> None:
    app = traced_app()
    for path in ("/health", "/metrics", "/info"):
        call(app, "GET", path)
    post(app, "/generate", BODY, headers=ONE)
    sink.trace_of("one")
    assert not [span for span in sink.spans if span.name.startswith("GET")]


@pytest.mark.parametrize(
    ("script", "stream", "status"),
    [
        (Script(error=GenerationError("the output is not finite"), error_after=1), False, 424),
        (Script(error=GenerationError("the output is not finite"), error_after=1), True, 200),
        (Script(error=ValueError("a defect"), error_after=1), False, 500),
    ],
)
def test_a_request_that_is_lost_is_an_error(
    traced_app: MakeApp, sink: Sink, script: Script, stream: bool, status: int
) -> None:
    path = "/generate_stream" if stream else "/generate"
    reply = post(traced_app(FakeGenerator(script)), path, BODY, headers=ONE)
    assert reply.status_code == status
    trace = sink.trace_of("one")
    assert trace[""].is_error and trace["decode"].is_error
    assert trace[""].attributes["error.type"] in ("generation", "internal")
    assert trace[""].attributes["http.response.status_code"] == status
    assert not trace["prefill"].is_error
    assert b"not finite" not in b"".join(sink.received)


def test_a_request_that_is_refused_is_none(traced_app: MakeApp, sink: Sink) -> None:
    post(traced_app(), "/generate", {"inputs": ""}, headers=ONE)
    post(traced_app(FakeGenerator(full=True)), "/generate", BODY, headers={"x-request-id": "two"})
    post(traced_app(api_key="sesame"), "/generate", BODY, headers={"x-request-id": "three"})
    found = {name: sink.trace_of(name)[""] for name in ("one", "two", "three")}
    types = {name: span.attributes["error.type"] for name, span in found.items()}
    assert types == {"one": "validation", "two": "overloaded", "three": "unauthorized"}
    assert found["one"].attributes["tessera.error.param"] == "inputs"
    assert not any(span.is_error for span in found.values())
    assert {span.name for span in found.values()} == {"POST /generate"}


@pytest.mark.parametrize("receive_says_so", [True, False])
def test_a_client_that_leaves_cancels(
    traced_app: MakeApp, sink: Sink, receive_says_so: bool
) -> None:
    app = traced_app(FakeGenerator(Script(hang_after=2)))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate_stream",
        "raw_path": b"/generate_stream",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"one")],
    }
    body = json.dumps(BODY).encode()
    asyncio.run(app(scope, *disconnecting(body, "http.response.body", receive_says_so)))
    trace = sink.trace_of("one")
    assert trace[""].attributes["error.type"] == "cancelled"
    assert trace["decode"].attributes["error.type"] == "cancelled"
    assert not trace[""].is_error and not trace["decode"].is_error
    assert "error.type" not in trace["prefill"].attributes


def test_several_answers_have_parts_of_their_own(traced_app: MakeApp, sink: Sink) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "n": 2}
    assert post(traced_app(), "/v1/chat/completions", body, headers=ONE).status_code == 200
    root = sink.trace_of("one")[""]
    decodes = [s for s in sink.spans if s.trace_id == root.trace_id and s.name == "decode"]
    assert {span.attributes["tessera.answer"] for span in decodes} == {0, 1}
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert root.attributes["gen_ai.usage.output_tokens"] == 6
    assert root.attributes["gen_ai.request.choice.count"] == 2


def test_preemptions_and_steps_are_told(sink: Sink, tracing: Tracing) -> None:
    stream = FakeStream(Script(), request(), 0)
    one = record("one")
    trace = tracing.begin(_headers())
    one.trace = trace
    one.submitted(stream.request, stream)
    progress = stream.progress
    assert progress.is_traced
    begun = progress.submitted_at
    progress.started_at = begun + 1
    for forward_ns in (10, 20):
        progress.step_done(shard_pb2.StepReply(vision_ns=5, forward_ns=forward_ns, sample_ns=1))
    progress.first_token_at = begun + 2
    progress.step_done(shard_pb2.StepReply(forward_ns=40, sample_ns=2))
    progress.preempted_at = [begun + 2.5]
    progress.last_token_at, progress.generated_tokens = begun + 4, 2
    progress.finish_reason = FinishReason.EOS
    one.ended = begun + 5
    trace.end(one)
    found = sink.trace_of("one")
    lengths = {name: round((s.end_ns - s.start_ns) / 1e9, 3) for name, s in found.items() if name}
    assert (lengths["queue"], lengths["prefill"], lengths["decode"]) == (1, 1, 2)
    assert found["decode"].events == ["preempted"] and found["prefill"].events == []
    prefill, decode = found["prefill"].attributes, found["decode"].attributes
    assert (prefill["tessera.steps"], decode["tessera.steps"]) == (2, 1)
    assert prefill["tessera.shard.vision_s"] == 1e-8
    assert prefill["tessera.shard.forward_s"] == 3e-8 and decode["tessera.shard.forward_s"] == 4e-8
    assert prefill["tessera.shard.sample_s"] == 2e-9
    assert decode["tessera.preemptions"] == 1


def test_a_request_that_waits_too_long_ends_in_the_queue(sink: Sink, tracing: Tracing) -> None:
    stream = FakeStream(Script(), request(), 0)
    one = record("one")
    one.submitted(stream.request, stream)
    one.failed(OverloadedError("too long"))
    one.ended = stream.progress.submitted_at + 3
    tracing.begin(_headers()).end(one)
    trace = sink.trace_of("one")
    assert "prefill" not in trace and "decode" not in trace
    assert trace["queue"].attributes["error.type"] == "overloaded"


def test_nothing_of_a_client_is_sent(traced_app: MakeApp, sink: Sink) -> None:
    picture = png(40, 30, seed=1)
    inputs = f"![](data:image/png;base64,{picture})Private words"
    headers = ONE | {"authorization": "Bearer sesame", "cookie": "c00kie"}
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 3, "stop": ["secret stop"]}}
    app = traced_app(kind="next-mistral", api_key="sesame")
    assert post(app, "/generate?key=sesame", body, headers=headers).status_code == 200
    post(app, "/sesame", body, headers=headers | {"x-request-id": "two"})
    sink.trace_of("one"), sink.trace_of("two")
    sent = b"".join(sink.received)
    assert b"POST /generate" in sent
    for secret in (b"sesame", b"Private", b"Hello", b"secret stop", b"c00kie", b"key=", b"base64"):
        assert secret not in sent
    assert picture[:30].encode() not in sent


def test_the_log_names_the_trace(
    traced_app: MakeApp, sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tessera.router.request_log")
    post(traced_app(), "/generate", BODY, headers=ONE | {"traceparent": SAMPLED})
    fields = [vars(r)["fields"] for r in caplog.records if r.name == "tessera.router.request_log"]
    assert [one["trace_id"] for one in fields] == [TRACE]


def hung_collector() -> tuple[str, socket.socket]:
    """It takes connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


def refusing_collector() -> tuple[str, socket.socket]:
    """Nobody listens there; the socket keeps the port from others."""
    placeholder = socket.socket()
    placeholder.bind(("127.0.0.1", 0))
    return f"http://127.0.0.1:{placeholder.getsockname()[1]}", placeholder


@pytest.mark.parametrize("collector", [hung_collector, refusing_collector])
def test_a_collector_that_is_down_costs_traces_only(
    collector: Callable[[], tuple[str, socket.socket]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    checkpoint: Callable[[str], Path],
    make_validator: Any,
) -> None:
    monkeypatch.setattr("tessera.router.tracing.QUEUE_SPANS", 16)
    monkeypatch.setattr("tessera.router.tracing.BATCH_SPANS", 4)
    address, held = collector()
    tracing = Tracing(OtlpExporter(address), "name", "1")
    generator = FakeGenerator()
    metrics = Metrics()
    validator = make_validator("llama", generator, metrics)
    files = ModelFiles.read(checkpoint("llama"))
    app = create_app(RouterSettings(), generator, validator, files, metrics, tracing)
    for _ in range(20):  # more spans than the queue holds
        assert post(app, "/generate", BODY).status_code == 200
    closing = threading.Thread(target=tracing.close, daemon=True)
    closing.start()
    closing.join(10)  # the library's own limit is 30
    assert not closing.is_alive()
    assert caplog.text.count("traces do not reach") == 1
    assert post(app, "/generate", BODY).status_code == 200
    held.close()


def test_a_collector_that_comes_back_is_told(
    sink: Sink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tessera.router.tracing")
    monkeypatch.setattr("tessera.router.tracing.SEND_TIMEOUT_S", 0.5)
    exporter = OtlpExporter(sink.address)
    sink.refuses = True
    assert exporter.export([]) is SpanExportResult.FAILURE
    sink.refuses = False
    assert exporter.export([]) is SpanExportResult.SUCCESS
    exporter.shutdown()
    told = [r.getMessage() for r in caplog.records if r.name == "tessera.router.tracing"]
    assert len(told) == 2 and told[1] == f"traces reach {sink.address} again"


def test_what_is_queued_is_sent_at_the_end(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.router.tracing.SEND_INTERVAL_S", 3600.0)
    tracing = Tracing(OtlpExporter(sink.address), "name", "1")
    tracing.begin(_headers()).end(record("one"))
    assert sink.spans == []
    tracing.close()
    assert [span.attributes["tessera.request_id"] for span in sink.spans] == ["one"]


def test_a_defect_of_tracing_costs_the_trace_only(
    traced_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def describe(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("tessera.router.tracing.describe", describe)
    assert post(traced_app(), "/generate", BODY, headers=ONE).status_code == 200
    assert "request one: its trace cannot be made" in caplog.text


def record(request_id: str) -> RequestRecord:
    one = RequestRecord(request_id, "POST", route="/generate", status=200)
    one.ended = one.began
    return one


def request() -> Request:
    return Request((1, 2), (), SamplingParams(), StoppingParams(4))


def _headers() -> Headers:
    return Headers({})
