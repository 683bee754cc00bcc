"""One epoch of a group, from its ranks' start to its end: every rank watched, wherever it runs, and the cause of the end named."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import InvalidRequest
from tensorway_worker.group_report import RankReport
from tensorway_worker.hosted_rank import Block, BlockLost, StartedRank, exit_words, name_of
from tensorway_worker.meeting import Answer, Meeting
from tensorway_worker.rank import launch as words
from tensorway_worker.rank.launch import RankStatus
from tensorway_worker.verdict import Finding, Weight, cause_of

_LOG = logging.getLogger(__name__)
#: The others' words on what went wrong are waited for this long: the cause may be heard after its consequences.
_OTHERS_WORDS_S: Final = 0.1
#: A rank that has worked for less of its time than this waits for others.
_BUSY_SHARE: Final = 0.5
_LAST_LINES: Final = 20
_SHOWN_LINES: Final = 5
#: Longest line and longest text that is kept: both go into the node's document in the registry.
_LINE_CHARS: Final = 1000
_TEXT_CHARS: Final = 4000
#: Ranks that are named beside the first where several are late.
_NAMED_RANKS: Final = 3
#: Findings that are told with the rank's last lines; the others have them already, or none.
_WITH_LINES: Final = (Weight.OWN, Weight.SILENT, Weight.CONSEQUENCE)
#: States of a group in the order in which it passes through them.
_ORDER: Final = (words.STARTING, words.LOADING, words.WARMING, words.READY)


class RankFailure(Exception):
    """An epoch has ended; the text says why."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a rank may take, seconds."""

    startup_s: float
    #: Silence, once it is ready.
    hung_after_s: float
    max_step_s: float


@dataclass(slots=True, eq=False)
class _Seen:
    """What is known of one rank."""

    rank: int
    node: str
    started: StartedRank | None = None
    status: RankStatus = field(default_factory=lambda: RankStatus(words.STARTING))
    heard_s: float = 0.0
    has_ended: bool = False
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    @property
    def name(self) -> str:
        return name_of(self.rank, self.node)

    @property
    def said(self) -> str:
        lines = " | ".join(list(self.last_lines)[-_SHOWN_LINES:])
        return f"; its last lines: {lines}" if lines else ""

    @property
    def standing(self) -> str:
        return f"state {self.status.state}" + (f": {self.status.detail}" if self.status.detail else "")

    def report(self) -> RankReport:
        status, started = self.status, self.started
        return RankReport(
            self.rank, self.node, started.pid if started else 0, started.device if started else "", status.state, status.detail,
            status.fraction, status.num_steps, status.weights_bytes, status.memory_bytes, status.memory_limit_bytes, status.busy_share,
            status.num_running_answers, status.num_waiting_answers, status.num_free_blocks, status.num_exported_spans,
            status.num_dropped_spans,
        )


class Epoch:
    """Implements `RankEvents` for one forming of a group. `run`, then `end` in any case. Lives in the loop."""

    def __init__(self, blocks: Sequence[Block], bounds: Bounds, group: str, on_status: Callable[[bool], None]) -> None:
        """`on_status` is called after each status; True where a state, a detail or the endpoint has changed."""
        self._blocks = tuple(blocks)
        self._bounds = bounds
        self._group = group
        self._on_status = on_status
        self._loop = asyncio.get_running_loop()
        self._meeting = Meeting(self._loop.call_later)
        self._seen = {rank: _Seen(rank, block.node) for block in blocks for rank in block.ranks}
        self._findings: list[Finding] = []
        self._went_wrong = asyncio.Event()
        self._all_ready = asyncio.Event()
        #: A rank has ended of itself, and all its words have been heard: nothing that still comes explains more.
        self._is_explained = asyncio.Event()

    @property
    def ranks(self) -> tuple[RankReport, ...]:
        return tuple(seen.report() for seen in self._seen.values())

    @property
    def state(self) -> str:
        """The state of the rank that is furthest behind."""
        return self._hindmost().status.state

    @property
    def detail(self) -> str:
        """What the rank does that is furthest behind; empty once all are ready."""
        seen = self._hindmost()
        if seen.status.state == words.READY:
            return ""
        if len(self._seen) == 1:
            return seen.status.detail
        return f"{seen.name}: {seen.status.detail or seen.status.state}"

    @property
    def fraction(self) -> float:
        """Progress of the rank that is furthest behind, 0 to 1; negative where unknown."""
        return self._hindmost().status.fraction

    @property
    def leader(self) -> RankStatus:
        return self._seen[0].status

    async def run(self) -> None:
        """Starts the ranks and watches them. Always ends with RankFailure, unless it is cancelled."""
        try:
            # Other nodes first: where one refuses, nothing has been started here.
            for block in reversed(self._blocks):
                for rank in await block.start():
                    self._seen[rank.rank].started = rank
        except BlockLost as lost:
            raise RankFailure(str(lost)) from lost
        self._on_status(True)
        try:
            async with asyncio.TaskGroup() as tasks:
                for block in self._blocks:
                    tasks.create_task(self._run_block(block))
                tasks.create_task(self._watch_startup())
                tasks.create_task(self._watch_silence())
                await self._went_wrong.wait()
                await self._hear_the_others()
                cause = cause_of(self._findings)
                raise RankFailure(cause.text + (self._seen[cause.rank].said if cause.weight in _WITH_LINES else ""))
        except ExceptionGroup as group:
            failures, others = group.split(RankFailure)
            if failures is None or others is not None:
                raise
            raise failures.exceptions[0] from None

    async def end(self, grace_s: float) -> None:
        """Ends all ranks; with a grace the leader's block first, for what it has accepted needs the others."""
        first, *others = self._blocks
        if grace_s > 0:
            await first.stop(grace_s)
            await asyncio.gather(*(block.stop(grace_s) for block in others))
        else:
            await asyncio.gather(*(block.stop(0.0) for block in self._blocks))
        self._meeting.end("the epoch is over")

    def on_status(self, rank: int, status: RankStatus) -> None:
        seen = self._seen[rank]
        before, seen.status, seen.heard_s = seen.status, status, self._loop.time()
        has_changed = (before.state, before.detail, before.endpoint) != (status.state, status.detail, status.endpoint)
        if has_changed:
            self._log_progress(seen)
        if status.state == words.FAILED:
            weight = Weight.CONSEQUENCE if status.is_consequence else Weight.OWN
            self._find(seen, weight, f"{seen.name}: {status.detail}" if len(self._seen) > 1 else status.detail)
        elif status.step_running_s > self._bounds.max_step_s:
            guilty = self._whose_step(seen)
            ran_s = guilty.status.step_running_s
            text = f"{guilty.name}: a step has run for {ran_s:.0f} s, longer than max_step_s={self._bounds.max_step_s:.0f}"
            self._find(guilty, Weight.SILENT, text)
        if not self._unready():
            self._all_ready.set()
        self._on_status(has_changed)

    def on_output(self, rank: int, line: str) -> None:
        self._seen[rank].last_lines.append(line[:_LINE_CHARS])

    def on_operation(self, rank: int, line: bytes, answer: Answer) -> None:
        try:
            self._meeting.take(line, answer)
        except InvalidRequest as error:
            self._find(self._seen[rank], Weight.OWN, f"{self._seen[rank].name}: {error}")

    def on_exit(self, rank: int, code: int) -> None:
        seen = self._seen[rank]
        seen.has_ended = True
        weight = Weight.OWN if code < 0 else Weight.SILENT
        if seen.status.state != words.FAILED:
            self._find(seen, weight, f"{seen.name} {exit_words(code)}")
        if any(finding.rank == rank and finding.weight is Weight.OWN for finding in self._findings):
            self._is_explained.set()

    def _whose_step(self, seen: _Seen) -> _Seen:
        """Who holds up a step that takes too long. The leader's step is the whole group's: while its own thread has nothing to do, it
        waits for the one whose part has run for longest."""
        if seen.rank or seen.status.busy_share > _BUSY_SHARE:
            return seen
        others = [other for other in self._seen.values() if other.rank and other.status.step_running_s > 0]
        return max(others, key=lambda other: other.status.step_running_s, default=seen)

    async def _hear_the_others(self) -> None:
        try:
            async with asyncio.timeout(_OTHERS_WORDS_S):
                await self._is_explained.wait()
        except TimeoutError:
            return

    async def _run_block(self, block: Block) -> None:
        try:
            await block.run(self)
        except BlockLost as lost:
            self._findings.append(Finding(block.ranks[0], Weight.NODE_LOST, str(lost), self._loop.time()))
            self._went_wrong.set()

    async def _watch_startup(self) -> None:
        startup_s = self._bounds.startup_s
        try:
            async with asyncio.timeout(startup_s):
                await self._all_ready.wait()
        except TimeoutError:
            first, *others = sorted(self._unready(), key=_progress_of)
            # One that is slow holds up others, which then look the same from outside: all are named, each with its own lines.
            also = "".join(f"; nor is {seen.name} ({seen.standing}){seen.said}" for seen in others[:_NAMED_RANKS])
            text = f"{first.name} is not ready within startup_timeout_s={startup_s:.0f} ({first.standing}){first.said}{also}"
            self._find(first, Weight.LATE, text)

    async def _watch_silence(self) -> None:
        """Sleeps until the rank that was heard of longest ago would have been silent for too long."""
        is_second_look = False
        while True:
            now_s = self._loop.time()
            watched = [seen for seen in self._seen.values() if seen.status.state == words.READY and not seen.has_ended]
            silent = [seen for seen in watched if now_s - seen.heard_s >= self._bounds.hung_after_s]
            if silent and not is_second_look:
                # It may be this process that did not run (SIGSTOP, a paused machine): what the ranks said meanwhile is read first.
                is_second_look = True
                await asyncio.sleep(min(1.0, self._bounds.hung_after_s / 4.0))
                continue
            is_second_look = False
            if silent:
                text = f"{silent[0].name} has been silent for {self._bounds.hung_after_s:.1f} s and counts as hung"
                self._find(silent[0], Weight.SILENT, text)
                return
            oldest_s = min((seen.heard_s for seen in watched), default=now_s)
            await asyncio.sleep(max(0.01, oldest_s + self._bounds.hung_after_s - now_s))

    def _find(self, seen: _Seen, weight: Weight, text: str) -> None:
        self._findings.append(Finding(seen.rank, weight, text[:_TEXT_CHARS], self._loop.time()))
        self._went_wrong.set()

    def _hindmost(self) -> _Seen:
        """Of ranks that have come equally far the first."""
        return min(self._seen.values(), key=_progress_of)

    def _unready(self) -> list[_Seen]:
        return [seen for seen in self._seen.values() if seen.status.state != words.READY]

    def _log_progress(self, seen: _Seen) -> None:
        status = seen.status
        fields: dict[str, object] = {"group": self._group, "rank": seen.rank, "node": seen.node, "state": status.state}
        if status.detail:
            fields["detail"] = status.detail
        if status.fraction >= 0:
            fields["fraction"] = round(status.fraction, 3)
        _LOG.info("rank %s", status.state, extra={"fields": fields})


def _progress_of(seen: _Seen) -> int:
    """How far a rank has come; one that is stopping or has failed is behind all others."""
    return _ORDER.index(seen.status.state) if seen.status.state in _ORDER else -1
