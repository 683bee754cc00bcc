"""What the orchestrator counts, in Prometheus' words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tensorway.loads import ModelLoad

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class OrchestratorMetrics:
    """The families; `lane` gives the children of one model, looked up once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model",)
        self.requests = Counter("tensorway_requests", "Requests ended, by gRPC status.", ("model", "code"), registry=registry)
        self.queue_s = Histogram(
            "tensorway_queue_seconds", "Time in the queue, to the last attempt.", labels, buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram("tensorway_batch_rows", "Rows in a batch.", labels, buckets=_ROWS, registry=registry)
        self.step_s = Histogram("tensorway_step_seconds", "Step time of a batch.", labels, buckets=_SECONDS, registry=registry)
        self.retries = Counter("tensorway_retries", "Attempts after the first.", labels, registry=registry)
        self.lost = Counter("tensorway_lost_attempts", "Batches whose group was lost.", labels, registry=registry)
        self.hedges = Counter("tensorway_hedges", "Requests sent to a second group because they were late.", labels, registry=registry)
        self.hedge_wins = Counter("tensorway_hedge_wins", "Hedged requests that the second group answered.", labels, registry=registry)
        self.stuck = Counter("tensorway_stuck_batches", "Batches late beyond all prediction.", labels, registry=registry)
        self.quarantined = Counter("tensorway_quarantined", "Requests that killed two groups.", labels, registry=registry)
        self.fallbacks = Counter("tensorway_fallbacks", "Requests handed on to the model's fallback.", labels, registry=registry)
        self.repeats = Counter(
            "tensorway_idempotent_repeats", "Requests that came again with their key and were not run again.", labels, registry=registry
        )
        self.queued_rows = Gauge("tensorway_queued_rows", "Rows waiting.", labels, registry=registry)
        self.open_streams = Gauge("tensorway_open_streams", "Token streams that have a reader.", labels, registry=registry)
        self.waiting_choices = Gauge("tensorway_waiting_choices", "Answers that wait for a place on a group.", labels, registry=registry)
        self.parked_streams = Gauge("tensorway_parked_streams", "Token streams kept for a reader that may come back.", registry=registry)
        self.tokens = Counter("tensorway_tokens", "Tokens that groups have said.", labels, registry=registry)
        self.arrival = Gauge("tensorway_arrival_rows_per_second", "Rows that come, over some ten seconds.", labels, registry=registry)
        self.utilisation = Gauge(
            "tensorway_utilisation_ratio", "Share of the time that groups spend on this orchestrator's batches.", labels, registry=registry
        )
        self.predicted = Gauge("tensorway_predicted_replicas", "Replicas that this orchestrator's load needs.", labels, registry=registry)
        self.desired = Gauge("tensorway_desired_replicas", "Replicas that are wanted.", labels, registry=registry)
        self.restarts = Counter("tensorway_stream_restarts", "Answers continued after their group was lost.", labels, registry=registry)
        self.resumes = Counter("tensorway_stream_resumes", "Token streams that a reader came back to.", labels, registry=registry)

    def lane(self, model: str) -> LaneMetrics:
        return LaneMetrics(self, model)

    def loads(self, loads: Iterable[ModelLoad], wanted: Callable[[str], int]) -> None:
        """Sets the gauges of the load; `wanted` tells the replicas of a model."""
        for load in loads:
            self.arrival.labels(load.model).set(load.arrival_rows_per_s)
            self.utilisation.labels(load.model).set(load.utilisation)
            self.predicted.labels(load.model).set(load.predicted_replicas)
            self.desired.labels(load.model).set(wanted(load.model))

    def streams(self, model: str) -> StreamMetrics:
        """Those of a model that generates."""
        return StreamMetrics(self, model)


class LaneMetrics:
    """The counters of one model."""

    def __init__(self, families: OrchestratorMetrics, model: str) -> None:
        self._model = model
        self._requests = families.requests
        self._ok = families.requests.labels(model, "OK")
        self._queue_s = families.queue_s.labels(model)
        self._batch_rows = families.batch_rows.labels(model)
        self._step_s = families.step_s.labels(model)
        self._retries = families.retries.labels(model)
        self._lost = families.lost.labels(model)
        self._hedges = families.hedges.labels(model)
        self._hedge_wins = families.hedge_wins.labels(model)
        self._stuck = families.stuck.labels(model)
        self._quarantined = families.quarantined.labels(model)

    def answered(self, queue_s: float) -> None:
        self._ok.inc()
        self._queue_s.observe(queue_s)

    def failed(self, code: str) -> None:
        self._requests.labels(self._model, code).inc()

    def batch(self, rows: int, step_s: float) -> None:
        self._batch_rows.observe(rows)
        self._step_s.observe(step_s)

    def retried(self, number: int) -> None:
        self._retries.inc(number)

    def hedged(self, number: int) -> None:
        self._hedges.inc(number)

    def hedge_won(self) -> None:
        self._hedge_wins.inc()

    def stuck(self) -> None:
        self._stuck.inc()

    def quarantined(self) -> None:
        self._quarantined.inc()

    def lost(self) -> None:
        self._lost.inc()


class StreamMetrics:
    """The counters of one model that generates."""

    def __init__(self, families: OrchestratorMetrics, model: str) -> None:
        self._model = model
        self._requests = families.requests
        self._ok = families.requests.labels(model, "OK")
        self._queue_s = families.queue_s.labels(model)
        self._tokens = families.tokens.labels(model)
        self._restarts = families.restarts.labels(model)
        self._resumes = families.resumes.labels(model)
        #: Tokens that are not counted yet.
        self._num_said = 0

    def answered(self) -> None:
        self._ok.inc()

    def failed(self, code: str) -> None:
        self._requests.labels(self._model, code).inc()

    def sent(self, queue_s: float) -> None:
        self._queue_s.observe(queue_s)

    def said(self, num_tokens: int) -> None:
        # A step's tokens come in one turn of the loop, and are counted together.
        if not self._num_said and num_tokens:
            asyncio.get_running_loop().call_soon(self._count_said)
        self._num_said += num_tokens

    def _count_said(self) -> None:
        num_said, self._num_said = self._num_said, 0
        self._tokens.inc(num_said)

    def restarted(self) -> None:
        self._restarts.inc()

    def resumed(self) -> None:
        self._resumes.inc()
