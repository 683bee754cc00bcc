"""The leader's endpoint: batches over links, and single requests over `InferenceService/Infer` for debugging.

A batch is read and admitted in the loop, staged and run elsewhere, and answered in the loop again:

    loop: read, admit ──▶ [staging thread: preprocess, join] ──▶ torch thread: step ──▶ [staging thread: postprocess] ──▶ loop: answer

Small batches of a model without preprocessing skip the staging thread: handing over costs more than the work. In a group of several ranks a
conductor's thread waits for the step instead of the torch thread, which only computes this rank's part of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from tensorway.deadline import DEFAULT_TIMEOUT_S, Deadline
from tensorway.errors import Cancelled, InternalError, Overloaded, TensorwayError, Unavailable, as_tensorway_error
from tensorway.transport.port import Call, Exchange, Server
from tensorway_worker.rank.batch import Request
from tensorway_worker.rank.codec import Batch, Codec, Times
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.outputs import Answer
from tensorway_worker.rank.step import BatchRunner, Staged, is_fatal
from tensorway_worker.rank.step_trace import NO_TRACING, StepTracing, batch_fields

_LOG = logging.getLogger(__name__)

INFER: Final = "/tensorway.v1.InferenceService/Infer"
EXPLAIN: Final = "/tensorway.v1.InferenceService/Explain"
#: Batches accepted at once: one runs, the others wait. Two orchestrators may each keep two in flight.
MAX_BATCHES: Final = 4
#: What a refused batch is told to wait when no step has been measured yet, seconds.
_RETRY_AFTER_S: Final = 0.01
#: Batches of more bytes are staged apart from the torch thread; below, the hand-over costs more than the copy.
_STAGE_APART_BYTES: Final = 256 * 1024

#: Each request's answer or error; or the error of the whole batch.
Results = list[Answer | TensorwayError] | TensorwayError
#: Called in the loop with the outcome of an accepted batch.
Answered = Callable[[Results, Times], None]


@dataclass(slots=True)
class Accepted:
    """A batch in the waiting line or in the step."""

    batch: Batch
    answered: Answered
    received_s: float
    is_cancelled: bool = False
    staged: Staged | None = None
    prepare_s: float = 0.0
    step_began_s: float = 0.0
    step_s: float = 0.0

    def cancel(self) -> None:
        """The peer does not wait any more."""
        self.is_cancelled = True

    @property
    def times(self) -> Times:
        began_s = self.step_began_s or time.monotonic()
        return Times(int((began_s - self.received_s) * 1e6), int(self.step_s * 1e6), int(self.prepare_s * 1e6))


class Leader:
    """Serves one loaded revision. Lives in the loop; its work happens in the torch thread and one staging thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        executor: Executor,
        runner: BatchRunner,
        codec: Codec,
        epoch: int,
        stages_apart: bool,
        finishes_apart: bool,
        num_conductors: int = 0,
        tracing: StepTracing = NO_TRACING,
    ) -> None:
        self._loop = loop
        self._executor = executor
        self._runner = runner
        self._codec = codec
        self._epoch = epoch
        self._tracing = tracing
        self._stages_apart = stages_apart
        self._finishes_apart = finishes_apart
        self._staging = ThreadPoolExecutor(1, "staging")
        #: Threads that wait for the steps of a group of several ranks; with one rank the torch thread runs them itself.
        self._conductors = ThreadPoolExecutor(num_conductors, "conductor") if num_conductors else None
        self._last_step_ended_s = 0.0
        self._num_accepted = 0
        self._is_draining = False
        self._last_step_s = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, server: Server) -> None:
        """Adds Infer and Explain, for calls to this leader alone."""
        server.add_unary(INFER, self.infer)
        server.add_unary(EXPLAIN, self.explain)

    async def start(self) -> None:
        """Its threads start with the first batch."""

    def on_exchange(self, exchange: Exchange) -> None:
        """One batch from an orchestrator."""
        try:
            batch = self._codec.read_batch(exchange.head, exchange.payload)
            if batch.epoch != self._epoch:
                raise Unavailable(f"this group is in epoch {self._epoch}, the batch is for epoch {batch.epoch}")
            accepted = self._accept(batch, partial(self._reply, exchange))
        except TensorwayError as error:
            exchange.fail(error)
        except Exception as error:  # noqa: BLE001 - a bug here costs one batch, not the link
            _LOG.exception("a batch could not be read")
            exchange.fail(as_tensorway_error(error))
        else:
            exchange.on_cancel(accepted.cancel)

    def _reply(self, exchange: Exchange, results: Results, times: Times) -> None:
        if isinstance(results, TensorwayError):
            exchange.fail(results)
        else:
            exchange.reply(*self._codec.write_reply(results, times))

    async def infer(self, message: bytes, call: Call) -> bytes:
        """One InferRequest, run as a batch of one."""
        return await self._unary(self._codec.read_infer(message, _deadline(call).at_s), call)

    async def explain(self, message: bytes, call: Call) -> bytes:
        """One ExplainRequest."""
        return await self._unary(self._codec.read_explain(message, _deadline(call).at_s), call)

    async def _unary(self, request: Request, call: Call) -> bytes:
        num_bytes = request.layout.num_bytes
        future: asyncio.Future[Results] = self._loop.create_future()

        def answered(results: Results, times: Times) -> None:
            if not future.done():
                future.set_result(results)

        accepted = self._accept(Batch(0, self._epoch, (request,), num_bytes), answered)
        call.on_cancel(accepted.cancel)
        results = await future
        result = results if isinstance(results, TensorwayError) else results[0]
        if isinstance(result, TensorwayError):
            raise result
        return self._codec.write_infer(request.request_id, result)

    def _accept(self, batch: Batch, answered: Answered) -> Accepted:
        """Puts a batch into the waiting line. Raises Unavailable while draining, Overloaded where the line is full."""
        if self._is_draining:
            raise Unavailable("this group is draining")
        if self._num_accepted >= MAX_BATCHES:
            raise Overloaded(
                f"{self._num_accepted} batches run or wait at this group", retry_after_s=self._last_step_s or _RETRY_AFTER_S
            )
        accepted = Accepted(batch, answered, time.monotonic())
        self._num_accepted += 1
        self._idle.clear()
        if self._stages_apart or batch.num_bytes > _STAGE_APART_BYTES:
            self._staging.submit(self._guarded, accepted, self._stage_then_run)
        else:
            self._submit(accepted)
        return accepted

    def _submit(self, accepted: Accepted) -> None:
        """Puts a batch into the line of those that wait for their step. From any thread."""
        work = partial(self._guarded, accepted, self._run)
        if self._conductors is None:
            self._executor.enqueue(work)
        else:
            self._conductors.submit(work)

    async def drain(self, deadline: Deadline) -> int:
        """Refuses new batches and waits for the accepted ones; returns how many are left at the deadline."""
        self._is_draining = True
        try:
            async with asyncio.timeout(max(0.0, deadline.remaining_s())):
                await self._idle.wait()
        except TimeoutError:
            _LOG.warning("%d batches are still running at the end of the drain", self._num_accepted)
        return self._num_accepted

    def close(self) -> None:
        """Ends its threads without waiting for them."""
        self._staging.shutdown(wait=False, cancel_futures=True)
        if self._conductors is not None:
            self._conductors.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, accepted: Accepted, work: Callable[[Accepted], None]) -> None:
        """Runs a part of a batch's way, in whatever thread; a bug in it fails the batch, a lost device or group ends the rank."""
        try:
            work(accepted)
        except Exception as error:  # noqa: BLE001 - handed to the batch, and to the rank where it is lost
            batch = accepted.batch
            ids = (request.request_id for request in batch.requests if not isinstance(request, TensorwayError))
            _LOG.exception("a batch failed as a whole", extra={"fields": batch_fields(ids, batch.traceparent)})
            is_lost = is_fatal(error)
            failure = Unavailable(f"the group was lost: {error}") if is_lost else as_tensorway_error(error)
            self._hand_back(accepted, failure)
            if is_lost:
                self._executor.crash(error)

    def _stage_then_run(self, accepted: Accepted) -> None:
        if not accepted.is_cancelled:
            self._stage(accepted)
        self._submit(accepted)

    def _stage(self, accepted: Accepted) -> Staged:
        began_s = time.monotonic()
        staged = accepted.staged = self._runner.stage(accepted.batch.requests)
        accepted.prepare_s += time.monotonic() - began_s
        return staged

    def _run(self, accepted: Accepted) -> None:
        """In the torch thread, or a conductor's."""
        if accepted.is_cancelled:
            self._hand_back(accepted, Cancelled("the orchestrator withdrew the batch"))
            return
        staged = accepted.staged or self._stage(accepted)
        span = self._tracing.open(accepted.batch.traceparent)
        began_s = accepted.step_began_s = self._executor.begin_step()
        try:
            self._runner.run(staged)
        finally:
            ended_s = self._executor.end_step(began_s)
            if span is not None:
                self._tracing.close(span, began_s, ended_s, accepted.received_s)
            # Steps overlap in a pipeline: what counts is by how much this one put off the next.
            accepted.step_s = ended_s - max(began_s, self._last_step_ended_s)
            self._last_step_ended_s = ended_s
        self._last_step_s = accepted.step_s
        if self._finishes_apart:
            self._staging.submit(self._guarded, accepted, self._finish)
        else:
            self._finish(accepted)

    def _finish(self, accepted: Accepted) -> None:
        staged = accepted.staged
        if staged is None:
            raise InternalError("a batch was finished before it was staged")
        began_s = time.monotonic()
        results = self._runner.finish(staged)
        accepted.prepare_s += time.monotonic() - began_s
        self._hand_back(accepted, results)

    def _hand_back(self, accepted: Accepted, results: Results) -> None:
        self._loop.call_soon_threadsafe(self._answer, accepted, results)

    def _answer(self, accepted: Accepted, results: Results) -> None:
        """In the loop."""
        self._num_accepted -= 1
        if not self._num_accepted:
            self._idle.set()
        accepted.answered(results, accepted.times)


def _deadline(call: Call) -> Deadline:
    return call.deadline or Deadline.after(DEFAULT_TIMEOUT_S)
