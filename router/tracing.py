"""Traces of requests by OpenTelemetry, sent to a collector. Imported only where one is named.

What is sent is made when a request is over, so serving waits for none of it. The sending is a
thread's, out of a queue of limited length: a collector that is down or hangs costs traces.

Everything is said to the library outright, because it would else read the environment.
"""

import logging
import threading
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from grpc import Compression
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace import Tracer as SpanTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from tessera.router.request_record import RequestRecord
from tessera.router.trace_spans import describe

logger = logging.getLogger(__name__)

QUEUE_SPANS = 4096
BATCH_SPANS = 512
SEND_INTERVAL_S = 1.0
SEND_TIMEOUT_S = 5.0  # for a batch, all its tries together
FLUSH_S = 2.0  # at shutdown, for what is still queued
ABORT_S = 1.0  # after it, for a call under way to notice that it has ended
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTE_LENGTH = 256
MAX_EVENTS = 64


class Tracing:
    """Implements `request_record.Tracer` over one exporter."""

    def __init__(self, exporter: SpanExporter, service_name: str, version: str) -> None:
        """Start the thread that sends."""
        self._exporter = exporter
        self._provider = TracerProvider(
            sampler=ParentBased(root=ALWAYS_ON),  # who has begun the trace decides
            resource=Resource(
                {
                    "service.name": service_name,
                    "service.version": version,
                    "service.instance.id": str(uuid.uuid4()),
                }
            ),
            shutdown_on_exit=False,
            span_limits=SpanLimits(
                max_attributes=MAX_ATTRIBUTES,
                max_events=MAX_EVENTS,
                max_links=0,
                max_span_attributes=MAX_ATTRIBUTES,
                max_event_attributes=MAX_ATTRIBUTES,
                max_link_attributes=0,
                max_attribute_length=MAX_ATTRIBUTE_LENGTH,
                max_span_attribute_length=MAX_ATTRIBUTE_LENGTH,
            ),
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUE_SPANS,
                schedule_delay_millis=SEND_INTERVAL_S * 1000,
                max_export_batch_size=BATCH_SPANS,
                export_timeout_millis=SEND_TIMEOUT_S * 1000,
            )
        )
        self._tracer = self._provider.get_tracer("tessera.router", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Headers) -> "RequestTrace":
        """The trace of a request that has just come in, within its client's if it names one.

        A name that is malformed, or given twice, counts as none.
        """
        return RequestTrace(self._tracer, self._propagator.extract(_trace_headers(headers)))

    def close(self) -> None:
        """Send what is queued; blocks for little more than `FLUSH_S` seconds. To be called last."""
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
        if flushing.is_alive():
            self._exporter.shutdown()  # ends the call under way
            flushing.join(ABORT_S)


class RequestTrace:
    """The trace of one request: its own span from the start, the others at its end."""

    def __init__(self, tracer: SpanTracer, parent: Context) -> None:
        self._tracer = tracer
        self._span: Span = tracer.start_span("HTTP", parent, SpanKind.SERVER)
        context = self._span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.is_sampled = context.trace_flags.sampled

    def end(self, record: RequestRecord) -> None:
        """Hand over what there is to send. See `request_record.Trace`."""
        try:
            if self.is_sampled:
                describe(self._tracer, self._span, record)
            self._span.end(record.at_ns(record.ended))
        except Exception:  # a trace is never worth a request
            logger.exception("request %s: its trace cannot be made", record.request_id)


class OtlpExporter(SpanExporter):
    """Sends to a collector over gRPC, and says once when it cannot and once when it can again."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: `http://HOST:PORT`, or `https://`."""
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(
            endpoint=endpoint,
            insecure=urlsplit(endpoint).scheme == "http",
            timeout=SEND_TIMEOUT_S,
            compression=Compression.Gzip,
        )
        self._works = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch, within `SEND_TIMEOUT_S` seconds. Called by one thread."""
        result = self._exporter.export(spans)
        works = result is SpanExportResult.SUCCESS
        if works and not self._works:
            logger.info("traces reach %s again", self._endpoint)
        elif self._works and not works:
            logger.warning(
                "traces do not reach %s and are dropped until they do; requests go on. "
                "LOG_LEVEL=debug tells why",
                self._endpoint,
            )
        self._works = works
        return result

    def shutdown(self) -> None:
        """End a call under way; send no more."""
        self._exporter.shutdown()


def _trace_headers(headers: Headers) -> dict[str, str]:
    parents = headers.getlist("traceparent")
    if len(parents) != 1:
        return {}
    return {"traceparent": parents[0], "tracestate": ",".join(headers.getlist("tracestate"))}
