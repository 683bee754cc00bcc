"""`OpsService` at a leader: the level of the logs of all its ranks, and profiles of the whole group while it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from google.protobuf.message import DecodeError

from tensorway.errors import FailedPrecondition, InvalidRequest, Unavailable
from tensorway.telemetry.logs import LogLevel, set_level
from tensorway.telemetry.ops_service import PROFILE_GROUP, OpsServicer
from tensorway.transport.port import Server, Stream
from tensorway.v1 import ops_pb2
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.profiler import ProfileDetail, RankProfiler
from tensorway_worker.rank.side_calls import Told, told
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.rank.trace_merge import RankTrace, merge

_LOG = logging.getLogger(__name__)
#: Names of side calls.
LEVEL: Final = "level"
CLOCK: Final = "clock"
START: Final = "profile start"
STOP: Final = "profile stop"
DROP: Final = "profile drop"

_DEFAULT_STEPS: Final = 10
_MAX_STEPS: Final = 1000
_DEFAULT_S: Final = 30.0
_MAX_S: Final = 600.0
#: Beginning and gathering take time of their own, bounded by this, seconds.
_GATHER_S: Final = 120.0
_PIECE_BYTES: Final = 1 << 20
#: Readings of another rank's clock; the one that came back soonest counts.
_NUM_READINGS: Final = 5


def answer_side_calls(group: LinkedGroup, executor: Executor) -> None:
    """A follower does what its leader asks of it from here on."""
    profiler = RankProfiler(executor)

    def level(arguments: Mapping[str, Any]) -> Future[Told]:
        set_level(arguments["level"])
        _LOG.log(max(logging.INFO, logging.getLogger().level), "log level is %s, as the leader's", arguments["level"])
        return told()

    def start(arguments: Mapping[str, Any]) -> Future[Told]:
        return _then(profiler.start(arguments["number"], ProfileDetail(**arguments["detail"])))

    def stop(arguments: Mapping[str, Any]) -> Future[Told]:
        return _then(profiler.stop(arguments["number"]))

    def drop(arguments: Mapping[str, Any]) -> Future[Told]:
        return _then(profiler.drop(arguments["number"]))

    calls = group.side_calls
    for name, answerer in ((LEVEL, level), (START, start), (STOP, stop), (DROP, drop)):
        calls.add(name, answerer)
    calls.add(CLOCK, lambda _: told(str(time.time_ns())))


def _then(future: Future[Any]) -> Future[Told]:
    """The same, as what is told; bytes are its content."""
    answer: Future[Told] = Future()

    def done(ended: Future[Any]) -> None:
        error = ended.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(("", ended.result() or b""))

    future.add_done_callback(done)
    return answer


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is to be recorded."""

    num_steps: int
    max_s: float
    detail: ProfileDetail


class GroupOperations:
    """Answers OpsService for a whole group. Lives in the leader's loop."""

    def __init__(self, name: str, log_level: str, executor: Executor, group: LinkedGroup | SoloGroup) -> None:
        """`name` is the group's id, `log_level` the configured one."""
        self._name = name
        self._executor = executor
        self._group = group
        self._profiler = RankProfiler(executor)
        self._ops = OpsServicer(LogLevel(log_level, self._level_changed))
        self._others = range(1, group.topology.world_size) if isinstance(group, LinkedGroup) else range(0)
        self._number = 0
        self._is_profiling = False

    def attach(self, server: Server) -> None:
        """Adds the methods to a server that has not started."""
        self._ops.attach(server)
        server.add_stream(PROFILE_GROUP, self.profile_group)

    async def profile_group(self, stream: Stream) -> None:
        """One ProfileGroupRequest in, progress and the pieces of the file out."""
        wish = _read(await stream.read() or b"")
        if self._is_profiling:
            raise FailedPrecondition(f"group {self._name} is being profiled already; wait for that one to end", field="group")
        self._is_profiling = True
        try:
            await self._profile(stream, wish)
        finally:
            self._is_profiling = False

    async def _profile(self, stream: Stream, wish: _Wish) -> None:
        self._number += 1
        number = self._number
        try:
            async with self._bounded("begin"):
                await self._all(self._profiler.start(number, wish.detail), START, {"number": number, "detail": asdict(wish.detail)})
            num_steps = await self._follow(stream, wish)
            if not num_steps:
                raise FailedPrecondition(
                    f"group {self._name} ran no step in {wish.max_s:g} s; send requests while it is profiled", field="options.max_seconds"
                )
            await stream.write(self._progress(num_steps, wish, "gathering"))
            async with self._bounded("end"):
                ahead_us = [await self._ahead_us(rank) for rank in self._others]
                contents = await self._all(self._profiler.stop(number), STOP, {"number": number})
        except BaseException:
            self._drop(number)
            raise
        traces = [
            RankTrace(rank, self._label(rank), content, ahead)
            for rank, (content, ahead) in enumerate(zip(contents, [0.0, *ahead_us], strict=True))
        ]
        # A thread of its own: a long profile takes seconds to be put together.
        merged = await asyncio.to_thread(merge, traces)
        for offset in range(0, len(merged), _PIECE_BYTES):
            await stream.write(ops_pb2.ProfileGroupResponse(data=merged[offset : offset + _PIECE_BYTES]).SerializeToString())
        await stream.write(self._progress(num_steps, wish, "done"))

    async def _follow(self, stream: Stream, wish: _Wish) -> int:
        """Tells of each step until there are enough or the time is over; returns how many there were."""
        loop, executor = asyncio.get_running_loop(), self._executor
        first, news = executor.num_steps, asyncio.Event()
        told_of = -1
        executor.on_step = partial(loop.call_soon_threadsafe, news.set)
        try:
            async with asyncio.timeout(wish.max_s):
                while told_of < wish.num_steps:
                    news.clear()
                    num_steps = min(executor.num_steps - first, wish.num_steps)
                    if num_steps > told_of:
                        told_of = num_steps
                        await stream.write(self._progress(num_steps, wish, "recording"))
                    else:
                        await news.wait()
        except TimeoutError:
            pass  # what there is by now is the answer
        finally:
            executor.on_step = None
        return min(executor.num_steps - first, wish.num_steps)

    async def _all(self, own: Future[Any], call: str, arguments: Mapping[str, Any]) -> list[bytes]:
        """What each rank has to say, the leader's own first. Raises the first error."""
        others: list[Awaitable[Told]] = []
        if isinstance(self._group, LinkedGroup):
            others = [self._group.side_calls.ask(rank, call, arguments) for rank in self._others]
        first, *rest = await asyncio.gather(asyncio.wrap_future(own), *others)
        return [first or b"", *(content for _, content in rest)]

    async def _ahead_us(self, rank: int) -> float:
        """By how much another rank's clock is ahead of ours; 0 for one on this machine, but for what a reading costs."""
        assert isinstance(self._group, LinkedGroup)
        readings: list[tuple[int, float]] = []
        for _ in range(_NUM_READINGS):
            asked_ns = time.time_ns()
            text, _ = await self._group.side_calls.ask(rank, CLOCK, {})
            answered_ns = time.time_ns()
            readings.append((answered_ns - asked_ns, (int(text) - (asked_ns + answered_ns) / 2) / 1e3))
        took_ns, ahead_us = min(readings)
        # Within what the reading took, the clocks are one.
        return 0.0 if abs(ahead_us) * 2e3 <= took_ns else ahead_us

    def _drop(self, number: int) -> None:
        """Nobody wants the recording any more. Does not wait."""
        self._profiler.drop(number)
        if isinstance(self._group, LinkedGroup):
            for rank in self._others:
                self._group.side_calls.ask(rank, DROP, {"number": number}).add_done_callback(_heard)

    def _level_changed(self, level: str) -> None:
        if isinstance(self._group, LinkedGroup):
            for rank in self._others:
                self._group.side_calls.ask(rank, LEVEL, {"level": level}).add_done_callback(_heard)

    def _label(self, rank: int) -> str:
        if not isinstance(self._group, LinkedGroup):
            return f"rank {rank}"
        place = self._group.topology.place(rank)
        return f"rank {rank} (stage {place.stage}, shard {place.shard})"

    def _progress(self, num_steps: int, wish: _Wish, state: str) -> bytes:
        progress = ops_pb2.ProfileProgress(group=self._name, num_steps=num_steps, num_wanted=wish.num_steps, state=state)
        return ops_pb2.ProfileGroupResponse(progress=progress).SerializeToString()

    @asynccontextmanager
    async def _bounded(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_GATHER_S):
                yield
        except TimeoutError:
            raise Unavailable(f"the ranks of group {self._name} did not {what} the profile in {_GATHER_S:g} s; a step may hang") from None


def _heard(future: asyncio.Future[Told]) -> None:
    """A rank that does not answer is gone, which its group knows by itself; the error is looked at so that nobody complains of it."""
    if not future.cancelled():
        future.exception()


def _read(message: bytes) -> _Wish:
    """Raises InvalidRequest naming the option at fault."""
    try:
        options = ops_pb2.ProfileGroupRequest.FromString(message).options
    except DecodeError as error:
        raise InvalidRequest("the message is no ProfileGroupRequest", field="request") from error
    num_steps, max_s = options.num_steps or _DEFAULT_STEPS, options.max_seconds or _DEFAULT_S
    if num_steps > _MAX_STEPS:
        raise InvalidRequest(f"options.num_steps: {num_steps} is more than {_MAX_STEPS}; record fewer", field="options.num_steps")
    if not 0.0 < max_s <= _MAX_S:
        raise InvalidRequest(f"options.max_seconds: {max_s:g} is outside 0 to {_MAX_S:g}", field="options.max_seconds")
    return _Wish(num_steps, max_s, ProfileDetail(options.with_shapes, options.with_memory, options.with_stacks))
