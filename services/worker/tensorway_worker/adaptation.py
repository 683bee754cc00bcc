"""`NodeService.AdaptModel`: training of a copy of a model, in ranks of its own, behind a permission that is off by default.

The ranks are started, met, loaded and watched like any group's; but they register nothing and answer nobody, so what serves cannot change.
The caller's stream is their life: when it ends, they are killed, and nothing is left but what was finished.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from tensorway.errors import FailedPrecondition, NotFound, Overloaded, PermissionDenied, TensorwayError, Unavailable
from tensorway.model_directory import ModelDirectory
from tensorway.transport.port import Server, Stream
from tensorway_worker.adaptation_directory import adapted_dir_of, finished, job_folder, write_request
from tensorway_worker.adaptation_news import REQUEST_FILE, News, Outcome
from tensorway_worker.adaptation_wire import (
    ADAPT_MODEL,
    STARTING,
    TRAINING,
    WRITING,
    AdaptOrder,
    done_message,
    progress_message,
    read_order,
)  # fmt: skip
from tensorway_worker.devices import DevicePool
from tensorway_worker.epoch import Bounds, Epoch, RankFailure
from tensorway_worker.local_block import LocalBlock
from tensorway_worker.orders import BlockOrders, Launch, launches
from tensorway_worker.settings import NodeSettings

_LOG = logging.getLogger(__name__)
_SECRET_BYTES: Final = 32
_RETRY_AFTER_S: Final = 30.0
T = TypeVar("T")


class AdaptationHost:
    """Answers AdaptModel, one caller at a time."""

    def __init__(self, node: str, directories: Mapping[str, ModelDirectory], settings: NodeSettings, devices: DevicePool) -> None:
        self._node = node
        self._directories = directories
        self._settings = settings
        self._devices = devices
        self._running: asyncio.Task[None] | None = None
        self._is_draining = False

    def attach(self, server: Server) -> None:
        server.add_stream(ADAPT_MODEL, self.adapt_model)

    async def drain(self) -> None:
        """Ends what runs: its caller may ask another node. Returns when the ranks have been reaped."""
        self._is_draining = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))

    async def adapt_model(self, stream: Stream) -> None:
        """One adaptation, for as long as its caller waits."""
        if not self._settings.allow_adaptation:
            raise PermissionDenied(
                f"node {self._node} adapts no models: its setting allow_adaptation is false; set --allow-adaptation=true on the node",
                field="allow_adaptation",
            )
        message = await stream.read()
        order = read_order(message)
        directory = self._admit(order)
        job = _Job(stream, order, directory, self._settings, self._node, self._devices)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = self._running = tasks.create_task(job.run(message or b""))
                stream.on_cancel(lambda: _cancel(running))
        except ExceptionGroup as group:
            raise _told(group) from group
        finally:
            self._running = None
        if running.cancelled() and self._is_draining:
            raise Unavailable(f"node {self._node} is draining")

    def _admit(self, order: AdaptOrder) -> ModelDirectory:
        if self._is_draining:
            raise Unavailable(f"node {self._node} is draining")
        if self._running is not None:
            raise Overloaded(f"node {self._node} is adapting a model already, and takes one at a time", retry_after_s=_RETRY_AFTER_S)
        found = [
            directory for revision, directory in self._directories.items()
            if directory.yaml.name == order.model and revision.startswith(order.revision)
        ]
        if not found:
            names = ", ".join(sorted(directory.yaml.name for directory in self._directories.values()))
            of = f"revision {order.revision[:12]} of " if order.revision else ""
            raise NotFound(f"node {self._node} does not offer {of}model {order.model[:128]!r}, only {names}", field="model")
        if found[0].yaml.parallel.nodes > 1:
            raise FailedPrecondition(f"model {order.model!r} is spread over several nodes; only groups on one node are adapted",
                                     field="parallel.nodes")
        return found[0]


@dataclass(slots=True, eq=False)
class _Job:
    """One adaptation."""

    stream: Stream
    order: AdaptOrder
    directory: ModelDirectory
    settings: NodeSettings
    node: str
    devices: DevicePool
    _news: asyncio.Queue[tuple[str, str]] = field(default_factory=asyncio.Queue)

    async def run(self, message: bytes) -> None:
        """Leaves no process behind, and no folder but the finished one."""
        adapted_dir = adapted_dir_of(self.settings.adapted_dir, self.settings.models_dir)
        fields = {"model": self.order.model, "revision": self.directory.spec.revision[:12], "steps": self.order.num_steps}
        _LOG.info("adaptation begun", extra={"fields": fields})
        async with _job_folder(adapted_dir) as folder:
            await _to_its_end(partial(write_request, folder, message, REQUEST_FILE))
            outcome = await self._trained(folder)
            made = await _to_its_end(partial(finished, folder, adapted_dir, self.directory, self.order, outcome))
            _LOG.info("adaptation done", extra={"fields": {**fields, "path": str(made.path), "loss": outcome.losses[1]}})
            await self.stream.write(done_message(
                made.yaml.name, made.spec.revision, str(made.path), outcome.num_parameters, self.order.num_steps, outcome.losses[1],
            ))  # fmt: skip

    async def _trained(self, folder: Path) -> Outcome:
        """Has a group train; what its ranks have written. Raises Unavailable where one of them was lost."""
        num_ranks = self.directory.yaml.parallel.world_size
        acquired = self.devices.acquire(self.directory.yaml, num_ranks)
        block = LocalBlock(self.node, self._launches(folder, acquired, num_ranks), acquired)
        bounds = Bounds(self.directory.yaml.startup_timeout_s, self.settings.hung_after_s, self.settings.max_step_s)
        epoch = Epoch((block,), bounds, self._group, lambda _: self._news.put_nowait((epoch.leader.news, epoch.detail or epoch.state)))
        try:
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(epoch.run())
                outcome = await self._followed()
                running.cancel()
        except ExceptionGroup as group:
            raise _told(group) from group
        finally:
            await asyncio.shield(epoch.end(0.0))
            self.devices.release(acquired)
        return outcome

    @property
    def _group(self) -> str:
        return f"{self.order.model}.adaptation@{self.node}"

    def _launches(self, folder: Path, acquired: tuple[tuple[str, ...], ...], num_ranks: int) -> tuple[Launch, ...]:
        parallel, settings = self.directory.yaml.parallel, self.settings
        orders = BlockOrders(
            model=self.order.model, revision=self.directory.spec.revision, group=self._group, epoch=1, owner=self.node,
            first_rank=0, num_ranks=num_ranks, pipeline=parallel.pipeline, tensor=parallel.tensor, is_spread=False,
            secret=secrets.token_hex(_SECRET_BYTES), verify=False, heartbeat_s=settings.heartbeat_s,
            hung_after_s=settings.hung_after_s, grace_s=0.0,
        )
        made = launches(orders, self.directory, settings, self.node, acquired)
        return tuple((replace(launch, adapt=str(folder)), environment) for launch, environment in made)

    async def _followed(self) -> Outcome:
        """Passes the news on until the outcome is there. Raises what the leader says went wrong."""
        num_steps, said, last = self.order.num_steps, "", (0, 0.0)
        while True:
            text, detail = await self._news.get()
            news = News.from_json(text) if text else News(detail=detail)
            if (error := news.error()) is not None:
                raise error
            state = WRITING if news.is_writing else TRAINING if text and news.detail else STARTING
            for step, loss in news.steps:
                last = (step, loss)
                await self.stream.write(progress_message(TRAINING, num_steps, step, loss))
            if news.outcome is not None:
                return news.outcome
            if news.detail and news.detail != said:
                said = news.detail
                await self.stream.write(progress_message(state, num_steps, *last, detail=said))


@asynccontextmanager
async def _job_folder(adapted_dir: Path) -> AsyncIterator[Path]:
    """`job_folder`; removing large files must not hold up the loop."""
    made = job_folder(adapted_dir)
    folder = made.__enter__()
    try:
        yield folder
    finally:
        await _to_its_end(partial(made.__exit__, None, None, None))


async def _to_its_end(call: Callable[[], T]) -> T:
    """Runs `call` in a thread, and waits for it even when cancelled: nothing may still write into a folder that is being removed."""
    running = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _told(group: ExceptionGroup[Exception]) -> Exception:
    """What the caller reads: an error of ours, or that the ranks were lost."""
    found: Exception | ExceptionGroup[Exception] = group.subgroup(TensorwayError) or group
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]
    return Unavailable(f"the adaptation was lost: {found}") if isinstance(found, RankFailure) else found
