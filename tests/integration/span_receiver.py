"""A receiver of spans over OTLP/gRPC, made from OpenTelemetry's own messages."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceServicer, add_TraceServiceServicer_to_server
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

#: Spans leave a second after the first of them.
PATIENCE_S = 60.0


@dataclass
class Received:
    """One span, its ids in hex."""

    span: Span
    #: Attributes of its resource.
    resource: dict[str, object]
    attributes: dict[str, object]

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def service(self) -> str:
        return str(self.resource["service.name"]).removeprefix("tensorway-")

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()

    @property
    def id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent_id(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def links(self) -> set[tuple[str, str]]:
        return {(link.trace_id.hex(), link.span_id.hex()) for link in self.span.links}

    @property
    def events(self) -> list[str]:
        return [event.name for event in self.span.events]

    @property
    def has_failed(self) -> bool:
        return self.span.status.code == Status.STATUS_CODE_ERROR


@dataclass
class Receiver(TraceServiceServicer):
    """What has come so far."""

    endpoint: str = ""
    spans: list[Received] = field(default_factory=list)
    #: Metadata of each export.
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def Export(self, request: pb.ExportTraceServiceRequest, context: grpc.aio.ServicerContext) -> pb.ExportTraceServiceResponse:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        for resource in request.resource_spans:
            of_resource = {pair.key: _value(pair.value) for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(Received(span, of_resource, {pair.key: _value(pair.value) for pair in span.attributes}))
        async with self._news:
            self._news.notify_all()
        return pb.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[Received]:
        return [span for span in self.spans if span.trace_id == trace_id]

    async def wait(self, found: Callable[[], object]) -> None:
        """Returns once `found` is true of what has come."""
        try:
            async with asyncio.timeout(PATIENCE_S), self._news:
                await self._news.wait_for(lambda: bool(found()))
        except TimeoutError:
            raise AssertionError(f"the spans never came; there are\n{self.drawn()}") from None

    def drawn(self) -> str:
        """Every span, as a tree."""
        return "\n".join(f"{trace_id}\n{tree(self.of(trace_id))}" for trace_id in {span.trace_id for span in self.spans})


def tree(spans: list[Received]) -> str:
    """The spans of one trace, indented below their parents, in the order of their starts; failed ones with a !."""
    ids = {span.id for span in spans}
    below: dict[str, list[Received]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.span.start_time_unix_nano):
        below[span.parent_id if span.parent_id in ids else ""].append(span)

    def lines(parent: str, depth: int) -> list[str]:
        found: list[str] = []
        for span in below[parent]:
            found.append(f"{'  ' * depth}{span.service}: {span.name}{' !' if span.has_failed else ''}")
            found += lines(span.id, depth + 1)
        return found

    return "\n".join(lines("", 0))


@asynccontextmanager
async def span_receiver() -> AsyncIterator[Receiver]:
    """A receiver on a free port."""
    receiver = Receiver()
    server = grpc.aio.server()
    add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(0)


def _value(value: AnyValue) -> object:
    return getattr(value, value.WhichOneof("value") or "string_value")
