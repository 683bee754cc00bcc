"""The path of one inference request through the gateway, the same for every dialect."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from typing import Final
from urllib.parse import quote

from tensorway.errors import InvalidRequest, Status, TensorwayError
from tensorway.transport.port import Call
from tensorway_gateway.admission import Admission
from tensorway_gateway.catalog import Catalog
from tensorway_gateway.models import Model, Revision
from tensorway_gateway.requests import MAX_PRIORITY, MAX_REQUEST_ID_CHARS, MIN_PRIORITY, Answer, Answered, Arrival
from tensorway_gateway.statistics import Statistics
from tensorway_gateway.upstream import Upstream
from tensorway_gateway.wire import read_reply, write_request_head

_LOG = logging.getLogger(__name__)
REQUEST_ID_TRAILER: Final = "tensorway-request-id"
TIMING_TRAILER: Final = "tensorway-timing"
_PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class RequestIds:
    """Ids for requests that came without one: unique in the mesh, and cheap."""

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def next(self) -> str:
        return f"{self._prefix}-{next(self._numbers):x}"


class RequestPath:
    """Look up, check, admit, send, read the answer, count."""

    def __init__(self, catalog: Catalog, admission: Admission, upstream: Upstream, statistics: Statistics) -> None:
        self._catalog = catalog
        self._admission = admission
        self._upstream = upstream
        self._statistics = statistics
        self._ids = RequestIds()

    def request_id(self, given: str) -> str:
        """The caller's id, or a new one. Raises InvalidRequest for one that is too long to carry along."""
        if not given:
            return self._ids.next()
        if len(given) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"request_id: {len(given)} characters are more than {MAX_REQUEST_ID_CHARS}", field="request_id")
        return given

    async def run(self, arrival: Arrival, call: Call) -> Answered:
        """Runs one request; raises the TensorwayError that says who must act. Sets the trailers either way."""
        model: Model | None = None
        revision: Revision | None = None
        try:
            model = self._catalog.find(arrival.model)
            revision = model.find(arrival.revision, is_version=arrival.is_version)
            if not MIN_PRIORITY <= arrival.priority <= MAX_PRIORITY:
                raise InvalidRequest(f"priority: {arrival.priority} is outside {MIN_PRIORITY} to {MAX_PRIORITY}", field="priority")
            rows = revision.check.rows(arrival.inputs, arrival.output_names, arrival.field_path)
            answer, sent_s, answered_s = await self._send(arrival, revision, rows, call)
        except TensorwayError as error:
            self._count_failure(arrival, model, revision, error)
            call.set_trailers(((REQUEST_ID_TRAILER, _header_text(arrival.request_id)),))
            raise
        took_s = time.monotonic() - arrival.arrived_s
        spec = revision.spec
        self._statistics.revision(spec.model, spec.revision).succeed(rows, answer.timing, took_s, time.time())
        self._statistics.count(spec.model, Status.OK, arrival.num_bytes, took_s)
        call.set_trailers((
            (REQUEST_ID_TRAILER, _header_text(arrival.request_id)),
            (TIMING_TRAILER, _timing_line(answer, answered_s - sent_s, took_s)),
        ))
        return Answered(answer, arrival.request_id, spec.version)

    async def _send(self, arrival: Arrival, revision: Revision, rows: int, call: Call) -> tuple[Answer, float, float]:
        """The answer, and when the request left and when its answer came, seconds on `time.monotonic()`."""
        admission, spec = self._admission, revision.spec
        admission.admit(arrival.num_bytes)
        try:
            sent_s = time.monotonic()
            deadline = admission.deadline(call.deadline, arrival.timeout_s, spec.default_timeout_s, sent_s)
            head = write_request_head(arrival, spec.revision, rows)
            payload = tuple([tensor.data for tensor in arrival.inputs])
            reply = await self._upstream.send(spec.model, head, payload, deadline)
            answered_s = time.monotonic()
            return read_reply(reply.head, reply.payload), sent_s, answered_s
        finally:
            admission.release(arrival.num_bytes, time.monotonic() - arrival.arrived_s)

    def _count_failure(self, arrival: Arrival, model: Model | None, revision: Revision | None, error: TensorwayError) -> None:
        took_s = time.monotonic() - arrival.arrived_s
        if model is None:
            self._statistics.unknown[error.status] += 1
        else:
            self._statistics.count(model.name, error.status, arrival.num_bytes, took_s)
        if revision is not None:
            self._statistics.revision(revision.spec.model, revision.spec.revision).fail(took_s, time.time())
        if _LOG.isEnabledFor(logging.DEBUG):
            fields = {"request_id": arrival.request_id, "model": arrival.model, "status": error.status.name}
            _LOG.debug("request failed: %s", error, extra={"fields": fields})


def _timing_line(answer: Answer, upstream_s: float, took_s: float) -> str:
    """Where the time went. `orchestrator` is what the way there and back took beyond queue and group; `gateway` all that was spent here."""
    timing = answer.timing
    upstream_us = int(upstream_s * 1e6)
    return (
        f"queue={timing.queue_us}us;batch={timing.batch_rows}/{timing.batch_requests};group={timing.group};attempts={timing.num_attempts};"
        f"wait={timing.wait_us}us;step={timing.step_us}us;gateway={int(took_s * 1e6) - upstream_us}us;"
        f"orchestrator={max(0, upstream_us - timing.queue_us - timing.group_us)}us"
    )


def _header_text(text: str) -> str:
    """`text` as a header may carry it: anything but printable ASCII is percent-encoded."""
    return text if text.isascii() and text.isprintable() and "%" not in text else quote(text, safe=_PRINTABLE)
