"""A collector for tests: takes spans by OTLP over gRPC and keeps them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

WAIT_S = 20.0


@dataclass(frozen=True)
class Span:
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # empty: none
    trace_state: str
    is_server: bool
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, Any]
    events: list[str]
    resource: dict[str, Any]


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.received: list[bytes] = []  # what came over the wire
        self.refuses = False
        self._spans: list[Span] = []
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"http://127.0.0.1:{port}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  (the name is the RPC's)
        if self.refuses:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "not now")
        with self._changed:
            self.received.append(request.SerializeToString())
            for resource_spans in request.resource_spans:
                resource = _attributes(resource_spans.resource.attributes)
                for scope_spans in resource_spans.scope_spans:
                    self._spans += [_span(span, resource) for span in scope_spans.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        with self._changed:
            return list(self._spans)

    def trace_of(self, request_id: str) -> dict[str, Span]:
        """The spans of one request by name, once its own has come; it is sent last."""
        deadline = time.monotonic() + WAIT_S
        with self._changed:
            while True:
                for span in self._spans:
                    if span.attributes.get("tessera.request_id") == request_id:
                        parts = [s for s in self._spans if s.trace_id == span.trace_id]
                        return {part.name: part for part in parts} | {"": span}
                left = deadline - time.monotonic()
                assert left > 0, f"no trace of {request_id}; there are {self._spans}"
                self._changed.wait(left)

    def close(self) -> None:
        self._server.stop(0).wait(5)


@contextlib.contextmanager
def otlp_sink() -> Iterator[Sink]:
    sink = Sink()
    try:
        yield sink
    finally:
        sink.close()


def _span(span: SpanMessage, resource: dict[str, Any]) -> Span:
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.kind == SpanMessage.SPAN_KIND_SERVER,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == Status.STATUS_CODE_ERROR,
        _attributes(span.attributes),
        [event.name for event in span.events],
        resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)
