"""What the orchestrator counts, in Prometheus' words. Counting adds to plain integers; the words are found when somebody scrapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tensorway.loads import ModelLoad
from tensorway_orchestrator.counts import BatchCounts, Distribution, ModelCounts, StreamCounts

_PREFIX: Final = "tensorway_orchestrator_"
_MODEL: Final = ("model",)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LaneLevel:
    """How much is open in one lane now. What the model has not, because it generates or does not, is None."""

    model: str
    num_open: int
    queued_rows: int | None = None
    num_streams: int | None = None
    num_waiting_choices: int | None = None


class OrchestratorMetrics(Collector):
    """All counts; `lane` and `streams` give those of one model, looked up once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._models: dict[str, ModelCounts] = {}
        self._batches: dict[str, BatchCounts] = {}
        self._streams: dict[str, StreamCounts] = {}
        self._loads: tuple[tuple[ModelLoad, int], ...] = ()
        #: Tells what is open, and how many streams wait for a reader that may come back.
        self.levels: Callable[[], Iterable[LaneLevel]] = tuple
        self.num_parked: Callable[[], int] = int
        registry.register(self)

    def lane(self, model: str) -> LaneMetrics:
        """Those of a model whose requests are joined."""
        return LaneMetrics(self.model(model), self._batches.setdefault(model, BatchCounts()))

    def streams(self, model: str) -> StreamMetrics:
        """Those of a model that generates."""
        return StreamMetrics(self.model(model), self._streams.setdefault(model, StreamCounts()))

    def model(self, model: str) -> ModelCounts:
        """Those of any model."""
        return self._models.setdefault(model, ModelCounts())

    def loads(self, loads: Iterable[ModelLoad], wanted: Callable[[str], int]) -> None:
        """Takes the load as it is now; `wanted` tells the replicas of a model."""
        self._loads = tuple((load, wanted(load.model)) for load in loads)

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now; called for each scrape, in the loop."""
        yield from self._requests()
        yield from self._batch_families()
        yield from self._stream_families()
        yield from self._level_families()
        yield from self._load_families()

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(f"{_PREFIX}requests", "Requests ended, by gRPC status.", labels=("model", "code"))
        for model, counts in self._models.items():
            requests.add_metric((model, "OK"), counts.num_answered)
            for code, number in counts.failures.items():
                requests.add_metric((model, code), number)
        yield requests
        yield _histogram("queue_seconds", "Time in the queue, to the last attempt.", self._models, lambda counts: counts.queue_s)
        yield _counter("fallbacks", "Requests handed on to the model's fallback.", self._models, lambda counts: counts.num_fallbacks)
        yield _counter(
            "idempotent_repeats", "Requests that came again with their key and were not run again.", self._models,
            lambda counts: counts.num_repeats,
        )

    def _batch_families(self) -> Iterator[Metric]:
        batches = self._batches
        yield _histogram("batch_rows", "Rows in a batch.", batches, lambda counts: counts.rows)
        yield _histogram("step_seconds", "Step time of a batch.", batches, lambda counts: counts.step_s)
        yield _counter("retries", "Attempts after the first.", batches, lambda counts: counts.num_retries)
        yield _counter("lost_attempts", "Batches whose group was lost.", batches, lambda counts: counts.num_lost)
        yield _counter("hedges", "Requests sent to a second group because they were late.", batches, lambda counts: counts.num_hedges)
        yield _counter("hedge_wins", "Hedged requests that the second group answered.", batches, lambda counts: counts.num_hedge_wins)
        yield _counter("stuck_batches", "Batches late beyond all prediction.", batches, lambda counts: counts.num_stuck)
        yield _counter("quarantined", "Requests that killed two groups.", batches, lambda counts: counts.num_quarantined)

    def _stream_families(self) -> Iterator[Metric]:
        streams = self._streams
        yield _counter("tokens", "Tokens that groups have said.", streams, lambda counts: counts.num_tokens)
        yield _histogram(
            "inter_token_seconds",
            "Time from a token of an answer to its next, lost groups and absent readers included; tokens that come in one message share "
            "its time, and those of an answer's first message have none.", streams, lambda counts: counts.token_gap_s,
        )
        yield _counter("stream_restarts", "Answers continued after their group was lost.", streams, lambda counts: counts.num_restarts)
        yield _counter("stream_resumes", "Token streams that a reader came back to.", streams, lambda counts: counts.num_resumes)
        yield GaugeMetricFamily(f"{_PREFIX}parked_streams", "Token streams kept for a reader that may come back.", self.num_parked())

    def _level_families(self) -> Iterator[Metric]:
        levels = tuple(self.levels())
        families: tuple[tuple[str, str, Callable[[LaneLevel], int | None]], ...] = (
            ("open_requests", "Requests not answered, waiting or running.", lambda level: level.num_open),
            ("queued_rows", "Rows waiting.", lambda level: level.queued_rows),
            ("open_streams", "Token streams that have a reader.", lambda level: level.num_streams),
            ("waiting_choices", "Answers that wait for a place on a group.", lambda level: level.num_waiting_choices),
        )
        for name, said, level_of in families:
            # A model may have several revisions, each with a lane of its own.
            sums: Counter[str] = Counter()
            for level in levels:
                if (number := level_of(level)) is not None:
                    sums[level.model] += number
            family = GaugeMetricFamily(_PREFIX + name, said, labels=_MODEL)
            for model, number in sums.items():
                family.add_metric((model,), number)
            yield family

    def _load_families(self) -> Iterator[Metric]:
        families: tuple[tuple[str, str, Callable[[ModelLoad, int], float]], ...] = (
            ("arrival_rows_per_second", "Rows that come, over some ten seconds.", lambda load, _: load.arrival_rows_per_s),
            ("utilisation_ratio", "Share of the time that groups spend on this orchestrator's batches.", lambda load, _: load.utilisation),
            ("predicted_replicas", "Replicas that this orchestrator's load needs.", lambda load, _: load.predicted_replicas),
            ("desired_replicas", "Replicas that are wanted.", lambda _, wanted: wanted),
            ("ready_replicas", "Live groups of the serving revision that this orchestrator reaches.", lambda load, _: load.num_groups),
        )
        for name, said, value_of in families:
            family = GaugeMetricFamily(_PREFIX + name, said, labels=_MODEL)
            for load, wanted in self._loads:
                family.add_metric((load.model,), value_of(load, wanted))
            yield family


class LaneMetrics:
    """Counts one model's requests and batches."""

    __slots__ = ("_batches", "_model")

    def __init__(self, model: ModelCounts, batches: BatchCounts) -> None:
        self._model = model
        self._batches = batches

    def answered(self, queue_s: float) -> None:
        self._model.num_answered += 1
        self._model.queue_s.observe(queue_s)

    def failed(self, code: str) -> None:
        self._model.failures[code] += 1

    def batch(self, rows: int, step_s: float) -> None:
        self._batches.rows.observe(rows)
        self._batches.step_s.observe(step_s)

    def retried(self, number: int) -> None:
        self._batches.num_retries += number

    def hedged(self, number: int) -> None:
        self._batches.num_hedges += number

    def hedge_won(self) -> None:
        self._batches.num_hedge_wins += 1

    def stuck(self) -> None:
        self._batches.num_stuck += 1

    def quarantined(self) -> None:
        self._batches.num_quarantined += 1

    def lost(self) -> None:
        self._batches.num_lost += 1


class StreamMetrics:
    """Counts one model's answers of tokens."""

    __slots__ = ("_model", "_streams")

    def __init__(self, model: ModelCounts, streams: StreamCounts) -> None:
        self._model = model
        self._streams = streams

    def answered(self) -> None:
        self._model.num_answered += 1

    def failed(self, code: str) -> None:
        self._model.failures[code] += 1

    def sent(self, queue_s: float) -> None:
        self._model.queue_s.observe(queue_s)

    def said(self, num_tokens: int, gap_s: float | None) -> None:
        """A message of `num_tokens` (at least one), `gap_s` seconds after its answer's tokens before it; None: it has none before."""
        streams = self._streams
        streams.num_tokens += num_tokens
        if gap_s is not None:
            streams.token_gap_s.observe(gap_s / num_tokens, num_tokens)

    def restarted(self) -> None:
        self._streams.num_restarts += 1

    def resumed(self) -> None:
        self._streams.num_resumes += 1


def _counter(name: str, said: str, counts: Mapping[str, T], number_of: Callable[[T], int]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, said, labels=_MODEL)
    for model, counted in counts.items():
        family.add_metric((model,), number_of(counted))
    return family


def _histogram(name: str, said: str, counts: Mapping[str, T], values_of: Callable[[T], Distribution]) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, said, labels=_MODEL)
    for model, counted in counts.items():
        values = values_of(counted)
        family.add_metric((model,), list(values.cumulative()), values.sum)
    return family
