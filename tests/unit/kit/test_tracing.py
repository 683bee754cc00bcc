"""W3C trace context, who is sampled, and what tracing costs where it is off."""

from __future__ import annotations

import asyncio
import datetime
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tensorway.cli.certs import Authority
from tensorway.errors import FailedPrecondition
from tensorway.telemetry import tracing
from tensorway.telemetry.trace_context import SpanContext, from_wire, new_trace, read_traceparent
from tensorway.telemetry.tracing import NO_TRACER, Span, Tracer, TraceSettings, child_of, open_tracer, service_resource
from tensorway.tls import WORKER, ServerTls, TlsFiles
from tensorway.transport import create_server
from tensorway.transport.port import Call, ServerOptions

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [
        (HEADER, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # the flag "random" of level 2 beside it
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True),
        (f"cc-{TRACE}-{SPAN}-01", True),
        (f"  {HEADER} ", True),
    ],
)
def test_a_callers_context_is_read(header: str, is_sampled: bool) -> None:
    assert read_traceparent(header, "a=1,b=2") == (SpanContext(TRACE, SPAN, "a=1,b=2"), is_sampled)


@pytest.mark.parametrize(
    "header",
    [
        None, "", b"bytes", "00", f"00-{TRACE}-{SPAN}", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}-1", f"00_{TRACE}_{SPAN}_01", f"0x-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more", f"{HEADER}, {HEADER}",
    ],
)  # fmt: skip
def test_what_is_no_context_is_none(header: str | bytes | None) -> None:
    assert read_traceparent(header) is None


@pytest.mark.parametrize("state", [None, b"a=1", "x" * 513, "a=1\nb=2", "ä=1"])
def test_a_tracestate_that_cannot_be_passed_on_is_left_out(state: str | bytes | None) -> None:
    given = read_traceparent(HEADER, state)
    assert given is not None
    assert given.context == SpanContext(TRACE, SPAN)


@pytest.mark.parametrize("context", [SpanContext(TRACE, SPAN), SpanContext(TRACE, SPAN, "a=1,b=2 c"), new_trace()])
def test_a_context_travels_between_services(context: SpanContext) -> None:
    assert from_wire(context.to_wire()) == context


def test_nothing_and_nonsense_are_not_sampled() -> None:
    assert from_wire("") is None
    assert from_wire("nonsense") is None
    assert from_wire(f"00-{TRACE}-{SPAN}-00") is None


class Kept:
    """Stands where spans are exported from, and keeps them."""

    num_exported = num_dropped = 0

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def offer(self, span: Span) -> None:
        self.spans.append(span)


def tracer(sample: float) -> Tracer:
    return Tracer(Kept(), sample)  # type: ignore[arg-type]


def test_the_caller_decides_and_the_share_is_for_the_others() -> None:
    never, always = tracer(0.0), tracer(1.0)
    followed = never.open({"traceparent": HEADER, "tracestate": "a=1"}, "call", 1.0)
    assert followed is not None
    assert (followed.context.trace_id, followed.parent_id, followed.context.state) == (TRACE, SPAN, "a=1")
    assert followed.context.span_id != SPAN
    assert always.open({"traceparent": f"00-{TRACE}-{SPAN}-00"}, "call", 1.0) is None
    assert never.open({}, "call", 1.0) is None
    for metadata in ({}, {"traceparent": "malformed"}):
        begun = always.open(metadata, "call", 1.0)
        assert begun is not None
        assert begun.parent_id == ""
        assert begun.context.trace_id != TRACE
    assert never.open({"traceparent": "malformed"}, "call", 1.0) is None


def test_the_share_is_kept() -> None:
    some = tracer(0.25)
    num_sampled = sum(some.open({}, "call", 1.0) is not None for _ in range(4000))
    assert 800 < num_sampled < 1200


def test_who_traces_nothing_samples_nothing() -> None:
    assert not NO_TRACER.is_on
    assert NO_TRACER.open({"traceparent": HEADER}, "call", 1.0) is None
    assert open_tracer(TraceSettings(sample=1.0), {}) is NO_TRACER


_SERVICES = """
import sys

def loaded():
    return {name for name in sys.modules if name.split(".")[0] == "opentelemetry"}

import tensorway.client, tensorway_gateway.__main__, tensorway_orchestrator.__main__, tensorway_worker.__main__
print(loaded())
import torch
# torch may look at it by itself.
before = loaded()
import tensorway_worker.rank.lifecycle
print(loaded() - before)
"""


def test_where_tracing_is_off_opentelemetry_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _SERVICES], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="trace_headers_file"):
        open_tracer(TraceSettings("127.0.0.1:1", headers_file=str(tmp_path / "missing")), {})
    wrong = tmp_path / "wrong"
    wrong.write_text("no colon here")
    with pytest.raises(FailedPrecondition, match="name: value"):
        open_tracer(TraceSettings("127.0.0.1:1", headers_file=str(wrong)), {})
    with pytest.raises(FailedPrecondition, match="trace_ca_file"):
        open_tracer(TraceSettings("https://127.0.0.1:1", ca_file=str(tmp_path / "missing")), {})


def span() -> Span:
    return child_of(new_trace(), "work", time.monotonic())


def test_a_receiver_that_is_away_costs_its_spans_and_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorway.telemetry import trace_export

    monkeypatch.setattr(trace_export, "_EXPORT_TIMEOUT_S", 0.2)
    away = open_tracer(TraceSettings("127.0.0.1:1", 1.0), {"service.name": "test"})
    with caplog.at_level("WARNING"):
        for _ in range(2):
            for _ in range(10):
                away.record(span())
        began_s = time.monotonic()
        away.close(20.0)
    assert time.monotonic() - began_s < 20.0
    assert away.counts == (0, 20)
    assert len([line for line in caplog.records if "cannot be exported to 127.0.0.1:1" in line.message]) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "trace-export"]
    # What comes afterwards is dropped, too.
    away.record(span())
    assert away.counts == (0, 21)


async def test_spans_leave_over_tls_with_the_headers_of_the_file(tmp_path: Path) -> None:
    Authority.open_or_make(tmp_path).issue(WORKER, ("127.0.0.1",), datetime.timedelta(days=1))
    (tmp_path / "headers").write_text("# a token\nAuthorization: Bearer secret\n\n")
    tls = ServerTls(TlsFiles(cert=str(tmp_path / "worker.pem"), key=str(tmp_path / "worker.key"), ca=""), requires_client=False)
    server = create_server(ServerOptions("127.0.0.1:0", tls=tls))
    came: asyncio.Future[tuple[bytes, str | bytes]] = asyncio.get_running_loop().create_future()

    async def export(message: bytes, call: Call) -> bytes:
        came.set_result((message, call.metadata["authorization"]))
        return b""

    server.add_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export", export)
    endpoint = await server.start()
    settings = TraceSettings(f"https://{endpoint}", 1.0, str(tmp_path / "ca.pem"), str(tmp_path / "headers"))
    over_tls = open_tracer(settings, service_resource("test", "test-1", "here"))
    try:
        over_tls.record(span())
        message, token = await asyncio.wait_for(came, 30)
    finally:
        await asyncio.to_thread(over_tls.close, 10.0)
        await server.stop(0.0)
    assert token == "Bearer secret"
    assert b"tensorway-test" in message
    assert over_tls.counts == (1, 0)


def test_a_full_queue_drops_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorway.telemetry import trace_export

    class Shut:
        """An exporter that does not come back until it is let go."""

        def __init__(self) -> None:
            self.is_free = threading.Event()
            self.has_begun = threading.Event()

        def export(self, spans: list[object]) -> object:
            self.has_begun.set()
            self.is_free.wait(60)
            return trace_export.SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            return

    shut = Shut()
    monkeypatch.setattr(trace_export, "_exporter_of", lambda settings: shut)
    full = open_tracer(TraceSettings("127.0.0.1:1", 1.0), {"service.name": "test"})
    try:
        for _ in range(trace_export._BATCH):
            full.record(span())
        assert shut.has_begun.wait(30)
        for _ in range(trace_export.MAX_WAITING + 7):
            full.record(span())
        assert full.counts == (0, 7)
    finally:
        shut.is_free.set()
        full.close(30.0)
    assert full.counts == (trace_export._BATCH + trace_export.MAX_WAITING, 7)


def test_spans_are_a_metric() -> None:
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import generate_latest

    registry = CollectorRegistry()
    tracing.TraceCollector(tracer(1.0), registry)
    assert b'tensorway_trace_spans_total{outcome="dropped"} 0.0' in generate_latest(registry)
    empty = CollectorRegistry()
    tracing.TraceCollector(NO_TRACER, empty)
    assert generate_latest(empty) == b""
