"""A rank from launch to exit.

    starting → the ranks meet → loading (this rank's part, in the torch thread) → warming → ready: endpoint open, lease held
    SIGTERM, or the node gone: lease released → accepted batches finish within the grace period → exit 0
    a second signal: out at once, status 130
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.model_directory import ModelDirectory, load_directory
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway_worker.engines.port import Cut
from tensorway_worker.rank.adaptation import NewsDesk, started
from tensorway_worker.rank.endpoint import Endpoint
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.explain import Explainer
from tensorway_worker.rank.facts import Facts
from tensorway_worker.rank.formation import Formed, join, load
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.group_port import GroupLost
from tensorway_worker.rank.launch import FAILED, LOADING, READY, STARTING, STOPPING, WARMING, RankLaunch
from tensorway_worker.rank.node_pipe import StatusPipe, watch_node
from tensorway_worker.rank.node_store import NodeStore
from tensorway_worker.rank.profiling import GroupOperations, answer_side_calls
from tensorway_worker.rank.report import Report
from tensorway_worker.rank.serving import service_of
from tensorway_worker.rank.step import BatchRunner
from tensorway_worker.rank.step_trace import rank_tracer, step_tracing
from tensorway_worker.rank.warmup import Warming

_LOG = logging.getLogger(__name__)
_EXIT_SECOND_SIGNAL: Final = 130
#: Ranks that do not come are their node's to notice, at the start-up timeout.
_STORE_TIMEOUT_S: Final = 3600.0
#: What the last spans get to be exported, seconds.
_FLUSH_S: Final = 1.0
T = TypeVar("T")


class _Stopped(Exception):
    """Asked to stop before it was ready."""


@dataclass(slots=True)
class Rank:
    """One run of one rank."""

    launch: RankLaunch
    _num_signals: int = 0
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _crash: BaseException | None = None
    _tracer: Tracer = NO_TRACER

    async def run(self, environment: Mapping[str, str], orders: int) -> int:
        """Serves until told to stop; returns the exit status. `orders` is the descriptor of the node's pipe."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        store = NodeStore(environment, _STORE_TIMEOUT_S)
        watch_node(loop, orders, self._on_node_gone, store.take_line)
        executor = Executor(loop, self.launch.threads, self._on_crash)
        executor.start()
        facts = Facts(self.launch.device, executor)
        report = Report(StatusPipe(environment), executor, facts.read)
        heartbeat = asyncio.create_task(report.heartbeat(self.launch.heartbeat_s))
        heartbeat.add_done_callback(self._on_heartbeat_end)
        try:
            self._tracer = facts.tracer = rank_tracer(self.launch)
            await self._serve(executor, report, facts, store)
        except _Stopped:
            return 0
        except Exception as error:  # noqa: BLE001 - reported to the node, with a status to exit with
            if not isinstance(error, TensorwayError):
                _LOG.exception("the rank failed")
            report.change(FAILED, _sentence(error), is_consequence=isinstance(error, GroupLost))
            return 1
        finally:
            await asyncio.to_thread(self._tracer.close, _FLUSH_S)
            store.close("the rank has ended")
            heartbeat.cancel()
            await asyncio.wait((heartbeat,))
            executor.stop()
        return 0

    async def _serve(self, executor: Executor, report: Report, facts: Facts, store: NodeStore) -> None:
        launch = self.launch
        directory = _checked_directory(launch)
        facts.limit_memory(directory.yaml.memory_limit_mb << 20)
        tracing = await asyncio.to_thread(step_tracing, launch, self._tracer)
        formed = await self._form(directory, executor, report, store)
        engine, group = formed.engine, formed.group
        if isinstance(group, LinkedGroup):
            group.tracing = tracing
            if launch.rank:
                answer_side_calls(group, executor)
        facts.weights_bytes = await self._unless_stopped(executor.run(engine.memory_bytes))
        if launch.adapt:
            await self._adapt(formed, directory, executor, report, facts)
            return
        explainer = Explainer(group, engine, directory.spec)
        runner = BatchRunner(engine, directory.spec, directory.path, group.run, explainer)
        endpoint: Endpoint | None = None
        try:
            if launch.rank == 0:
                report.change(WARMING)
                warming = Warming(engine, directory, runner, group)
                await self._unless_stopped(self._warm(executor, warming))
                # What is loaded stays: the collector need not look at it again and again while requests wait.
                gc.collect()
                gc.freeze()
                service = service_of(launch, directory, engine, group, runner, executor, facts, tracing)
                endpoint = Endpoint(launch, directory.spec, service, GroupOperations(launch.group, launch.log_level, executor, group))
                report.change(READY, endpoint=await endpoint.open())
            else:
                report.change(READY)
            await self._stopping.wait()
            if self._crash is not None:
                raise self._crash
            report.change(STOPPING)
            if endpoint is not None:
                await endpoint.drain(Deadline.after(launch.grace_s))
        finally:
            if endpoint is not None:
                await endpoint.close()
            runner.close()
            group.leave()

    async def _adapt(self, formed: Formed, directory: ModelDirectory, executor: Executor, report: Report, facts: Facts) -> None:
        """Trains instead of serving, until the node ends it."""
        linked = formed.group.training if isinstance(formed.group, LinkedGroup) else None
        desk = NewsDesk(report.tell)
        facts.news = desk.gathering.taken
        try:
            report.change(READY)
            if self.launch.rank == 0:
                await self._unless_stopped(started(Path(self.launch.adapt), directory, formed.engine, linked, executor, desk))
            await self._stopping.wait()
            if self._crash is not None:
                raise self._crash
        finally:
            formed.group.leave()

    async def _form(self, directory: ModelDirectory, executor: Executor, report: Report, store: NodeStore) -> Formed:
        """Meets the other ranks, where there are any, and loads this rank's part."""
        launch = self.launch
        cut: Cut | None = None
        linked: LinkedGroup | None = None
        if launch.world_size > 1:
            report.change(STARTING, "meeting the other ranks")
            linked, cut = await self._unless_stopped(executor.run(lambda: join(launch, directory, executor, store)))
        report.change(LOADING, f"loading {launch.model}")
        return await self._unless_stopped(executor.run(lambda: load(directory, launch, cut, linked)))

    def _warm(self, executor: Executor, warming: Warming) -> asyncio.Future[None]:
        """In the torch thread, or beside it where steps are only led from here."""
        if warming.group.num_conductors:
            return asyncio.get_running_loop().run_in_executor(None, warming.run, self.launch)
        return executor.run(partial(warming.run, self.launch))

    async def _unless_stopped(self, work: asyncio.Future[T]) -> T:
        """The result of `work`, or _Stopped as soon as the rank is asked to stop: loading cannot be interrupted, only left behind."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if self._crash is not None:
            raise self._crash
        if not work.done():
            work.cancel()
            raise _Stopped
        return work.result()

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            os._exit(_EXIT_SECOND_SIGNAL)
        self._stopping.set()

    def _on_node_gone(self) -> None:
        _LOG.warning("the node has gone; stopping")
        self._stopping.set()

    def _on_heartbeat_end(self, heartbeat: asyncio.Task[None]) -> None:
        if not heartbeat.cancelled() and (error := heartbeat.exception()) is not None:
            self._on_crash(error)

    def _on_crash(self, error: BaseException) -> None:
        self._crash = error
        self._stopping.set()


def _checked_directory(launch: RankLaunch) -> ModelDirectory:
    """The model directory, as the node saw it. Raises FailedPrecondition where it has changed since, or files are missing."""
    directory = load_directory(Path(launch.model_path))
    if directory.spec.revision != launch.revision:
        raise FailedPrecondition(
            f"{launch.model_path} has changed: it is revision {directory.spec.revision[:12]} now, not {launch.revision[:12]}",
            field="revision",
        )
    missing = [file.path for file in directory.missing_files()]
    if missing:
        raise FailedPrecondition(f"files are missing: {', '.join(missing)}; run `tensorway models fetch`", field="files")
    return directory


def _sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, TensorwayError) else f"{type(error).__name__}: {text}"
