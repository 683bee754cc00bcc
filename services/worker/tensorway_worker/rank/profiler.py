"""torch.profiler on one rank: started and stopped in the torch thread between two pieces of work, written out beside it."""

from __future__ import annotations

import gzip
import logging
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.rank.executor import Executor

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProfileDetail:
    """What is recorded beside the operators; each costs time while it is recorded."""

    with_shapes: bool = False
    with_memory: bool = False
    with_stacks: bool = False


@dataclass(slots=True)
class _Recording:
    number: int
    profile: Any
    is_running: bool = True


class RankProfiler:
    """At most one recording. Its methods may be called from any thread and return at once; what they say happens in the torch thread."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        #: The torch thread's own.
        self._recording: _Recording | None = None
        self._is_warm = False

    def start(self, number: int, detail: ProfileDetail) -> Future[None]:
        """Begins recording `number`; one that was left running is thrown away."""
        if self._is_warm:
            return self._enqueue(partial(self._start, number, detail))
        begun: Future[None] = Future()
        threading.Thread(target=self._warm_then_start, args=(number, detail, begun), name="profile", daemon=True).start()
        return begun

    def _warm_then_start(self, number: int, detail: ProfileDetail, begun: Future[None]) -> None:
        """The first profile of a process takes a second to begin, in which no step must wait: it is begun once beside them."""
        try:
            with torch.profiler.profile(activities=_activities(), acc_events=True):
                self._is_warm = True
        except Exception as error:  # noqa: BLE001 - told to whoever waits for it
            begun.set_exception(error)
            return
        self._enqueue(partial(self._start, number, detail)).add_done_callback(partial(_pass_on, begun))

    def stop(self, number: int) -> Future[bytes]:
        """Ends recording `number`; the future gets its Chrome trace, JSON gzipped. It fails with FailedPrecondition where there is none."""
        written: Future[bytes] = Future()
        self._enqueue(partial(self._stop, number, written)).add_done_callback(partial(_fail_with, written))
        return written

    def drop(self, number: int) -> Future[None]:
        """Ends recording `number`, if it runs, and throws it away."""
        return self._enqueue(partial(self._drop, number))

    def _enqueue(self, work: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a profile that fails must not end the rank
                done.set_exception(error)
            else:
                done.set_result(None)

        self._executor.enqueue(run)
        return done

    # What follows happens in the torch thread.

    def _start(self, number: int, detail: ProfileDetail) -> None:
        if self._recording is not None:
            self._drop(self._recording.number)
        profile = torch.profiler.profile(
            activities=_activities(), record_shapes=detail.with_shapes, profile_memory=detail.with_memory, with_stack=detail.with_stacks,
            acc_events=True,
        )
        profile.start()
        self._recording = _Recording(number, profile)

    def _stop(self, number: int, written: Future[bytes]) -> None:
        recording = self._recording
        if recording is None or recording.number != number:
            raise FailedPrecondition("the profile was given up before")
        self._recording = None
        recording.profile.stop()
        # Writing takes long: steps go on meanwhile.
        threading.Thread(target=_write, args=(recording.profile, written), name="profile", daemon=True).start()

    def _drop(self, number: int) -> None:
        if self._recording is not None and self._recording.number == number:
            recording, self._recording = self._recording, None
            recording.profile.stop()
            _LOG.info("a profile was given up")


def _activities() -> list[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    return [*activities, torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else activities


def _pass_on(begun: Future[None], done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        begun.set_exception(error)
    else:
        begun.set_result(None)


def _write(profile: Any, written: Future[bytes]) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="tensorway-profile-") as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            content = gzip.compress(path.read_bytes(), 1)
    except Exception as error:  # noqa: BLE001 - told to whoever waits for it
        written.set_exception(error)
    else:
        written.set_result(content)


def _fail_with(written: Future[bytes], done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        written.set_exception(error)
