"""The leader of a group that generates: one exchange for each answer, token frames back as fast as the reader takes them.

    loop: admit ──▶ staging thread: text to tokens ──▶ loop: Generator.submit ──▶ (its threads) ──▶ loop: token frames

A reader that is behind has no credit left; what is drawn meanwhile is joined into one longer frame. No answer waits for another's reader:
what is held is bounded by the length of the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from tensorway.deadline import Deadline
from tensorway.errors import FailedPrecondition, Overloaded, TensorwayError, Unavailable, as_tensorway_error
from tensorway.generation import GenerationYaml
from tensorway.model import Inputs, Outputs
from tensorway.model_directory import ModelDirectory
from tensorway.telemetry.tracing import NO_TRACER, Tracer
from tensorway.transport.port import Call, Exchange, Server, Stream
from tensorway.transport.streamed_exchange import StreamedExchange
from tensorway_worker.engines.generation.answer import Advance
from tensorway_worker.engines.generation.blocks import BlockPool
from tensorway_worker.engines.generation.engine import GenerationEngine
from tensorway_worker.engines.generation.generator import Generator
from tensorway_worker.engines.generation.requests import Finish, GenerationRequest, Sampling, StopRules
from tensorway_worker.engines.generation.scheduler import Limits, Scheduler
from tensorway_worker.engines.generation.text import TextSide
from tensorway_worker.engines.port import model_error
from tensorway_worker.rank.answer_trace import AnswerTrace, answer_trace
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.generation_wire import Asked, PromptDelta, delta_bytes, finished_bytes, joined, read_asked, read_attempt
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.leader import EXPLAIN, INFER
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.rank.step import is_fatal
from tensorway_worker.rank.step_trace import log_fields
from tensorway_worker.rank.waited_step import on_host, run_in

_LOG = logging.getLogger(__name__)
GENERATE: Final = "/tensorway.v1.InferenceService/Generate"
#: What a refused answer is told to wait before the first step has been measured, seconds.
_RETRY_AFTER_S: Final = 0.05
#: Every orchestrator keeps at most `max_sequences` answers here; this many times as many are accepted.
_MAX_OPEN: Final = 4
_WARM_UP_TOKENS: Final = 8
_WARM_UP_PROMPT: Final = 64


class Generations:
    """Serves one loaded revision that generates. Lives in the loop."""

    def __init__(
        self, directory: ModelDirectory, engine: GenerationEngine, group: LinkedGroup | SoloGroup, executor: Executor, epoch: int,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        yaml = directory.yaml.generation or GenerationYaml()
        windows = group.topology.pipeline if isinstance(group, LinkedGroup) else 1
        dimensions = engine.dimensions
        scheduler = Scheduler(
            BlockPool(dimensions.num_blocks, dimensions.block_tokens), Limits(yaml.max_sequences, yaml.step_tokens, windows)
        )
        self.text = _text_of(engine)
        self._directory = directory
        self._yaml = yaml
        self._engine = engine
        self._group = group
        self._executor = executor
        self._epoch = epoch
        self._tracer = tracer
        self._loop = asyncio.get_running_loop()
        self.generator = Generator(scheduler, self.text, dimensions.max_context, self._run_step, self._failure, windows)
        self._staging = ThreadPoolExecutor(1, "staging")
        self._num_open = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Starts its threads, and makes two answers to nobody: kernels are chosen, and the pace of steps is learnt."""
        self.generator.start()
        vocabulary, context = self._engine.dimensions.vocabulary, self._engine.dimensions.max_context
        size = max(1, min(_WARM_UP_PROMPT, context - _WARM_UP_TOKENS))
        waits = [_Awaited(self._loop.create_future()) for _ in range(2)]
        for number, wait in enumerate(waits):
            prompt = tuple((number * 7919 + place * 31) % vocabulary for place in range(size))
            stop = StopRules(max_tokens=_WARM_UP_TOKENS)
            self.generator.submit(GenerationRequest("warm-up", prompt, (), Sampling(), stop, 0, Deadline.after(3600.0).at_s), wait)
        await asyncio.gather(*(wait.done for wait in waits))

    def counts(self) -> dict[str, int]:
        """Answers that advance and that wait, and blocks that none holds, by field of `RankStatus`."""
        generator = self.generator
        return {
            "num_running_answers": generator.num_running, "num_waiting_answers": generator.num_waiting,
            "num_free_blocks": generator.num_free_blocks,
        }

    def on_exchange(self, exchange: Exchange) -> None:
        """One choice of a generation, from an orchestrator."""
        try:
            asked = read_attempt(exchange.head, self._epoch)
            self._accept(asked, exchange)
        except TensorwayError as error:
            exchange.fail(error)
        except Exception as error:  # noqa: BLE001 - a bug here costs one answer, not the link
            _LOG.exception("a generation could not be read")
            exchange.fail(as_tensorway_error(error))

    def attach(self, server: Server) -> None:
        """Adds Generate, for calls to this leader alone; Infer and Explain say that they are not for it."""
        server.add_stream(GENERATE, self._called)
        server.add_unary(INFER, self._refuse)
        server.add_unary(EXPLAIN, self._refuse)

    async def _called(self, stream: Stream) -> None:
        message = await stream.read()
        exchange = StreamedExchange(b"", stream.deadline or Deadline.after(self._directory.spec.default_timeout_s))
        stream.on_cancel(exchange.cancel)
        self._accept(read_asked(message or b"", self._directory.spec), exchange)
        await exchange.relay(stream)

    async def _refuse(self, message: bytes, call: Call) -> bytes:
        raise FailedPrecondition(
            f"this group of {self._directory.yaml.name} generates tokens: call Generate here, or Infer at the gateway", field="model"
        )

    def _accept(self, asked: Asked, exchange: Exchange) -> None:
        if self._is_draining:
            raise Unavailable("this group is draining")
        if self._num_open >= _MAX_OPEN * self._yaml.max_sequences:
            raise Overloaded(f"{self._num_open} answers run or wait at this group", retry_after_s=_RETRY_AFTER_S)
        self._num_open += 1
        self._idle.clear()
        trace = answer_trace(self._tracer, asked.traceparent, {"tensorway.request_id": asked.request_id, "tensorway.rank": 0})
        stream = _Stream(exchange, self.generator, self._closed, trace, asked)
        exchange.on_cancel(stream.cancel)
        exchange.on_credit(stream.flush)
        work = partial(asked.read, self.text, self._yaml, self._engine.dimensions.max_context, exchange.deadline.at_s)
        self._staging.submit(work).add_done_callback(partial(self._staged, stream))

    def _staged(self, stream: _Stream, work: Future[tuple[GenerationRequest, PromptDelta | None]]) -> None:
        """In the staging thread."""
        if not work.cancelled():
            self._loop.call_soon_threadsafe(stream.begin, work)

    def _closed(self) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._idle.set()

    def _run_step(self, carry: Inputs) -> Outputs:
        """In a window's thread."""
        began_s = self._executor.begin_step()
        try:
            if isinstance(self._group, LinkedGroup):
                return on_host(self._group.run(carry))
            return run_in(self._executor, self._group.run, carry)
        finally:
            self._executor.end_step(began_s)

    def _failure(self, error: Exception) -> TensorwayError:
        if is_fatal(error):
            self._executor.crash(error)
            raise error
        return model_error(error, self._directory.path, "a step of the generation")

    async def drain(self, deadline: Deadline) -> int:
        """Refuses new answers and waits for the accepted ones; returns how many are left at the deadline."""
        self._is_draining = True
        try:
            async with asyncio.timeout(max(0.0, deadline.remaining_s())):
                await self._idle.wait()
        except TimeoutError:
            _LOG.warning("%d answers are still being made at the end of the drain", self._num_open)
        return self._num_open

    def close(self) -> None:
        """Ends its threads without waiting for them."""
        self._staging.shutdown(wait=False, cancel_futures=True)
        self.generator.close()


class _Stream:
    """One answer on its way out. Implements `Listener`."""

    def __init__(
        self, exchange: Exchange, generator: Generator, on_closed: Callable[[], None], trace: AnswerTrace | None, asked: Asked
    ) -> None:
        self._exchange = exchange
        self._asked = asked
        self._generator = generator
        self._on_closed = on_closed
        self._trace = trace
        self._id = 0
        self._prompt: PromptDelta | None = None
        self._waiting: Advance | None = None
        self._finish: Finish | None = None
        self._is_open = True

    def begin(self, work: Future[tuple[GenerationRequest, PromptDelta | None]]) -> None:
        """The request has been read."""
        if not self._is_open:
            return
        try:
            request, self._prompt = work.result()
            self._id = self._generator.submit(request, self)
            if self._trace is not None:
                self._trace.read(len(request.prompt_ids), len(request.so_far))
        except TensorwayError as error:
            self.failed(error)
            return
        except Exception as error:  # noqa: BLE001 - a bug here costs one answer
            fields = log_fields(self._asked.request_id, self._asked.traceparent)
            _LOG.exception("a generation could not be prepared", extra={"fields": fields})
            self.failed(as_tensorway_error(error))
            return
        self.flush()

    def advanced(self, advance: Advance) -> None:
        if self._trace is not None:
            self._trace.advanced(advance)
        self._waiting = advance if self._waiting is None else joined(self._waiting, advance)
        self.flush()

    def finished(self, finish: Finish) -> None:
        if self._trace is not None:
            self._trace.finished(finish)
        self._finish = finish
        self.flush()

    def failed(self, error: TensorwayError) -> None:
        if self._close(f"{error.status.name}: {error.message}"):
            self._exchange.fail(error)

    def cancel(self) -> None:
        """The orchestrator wants no more of it."""
        if self._close("CANCELLED: nobody waits for it any more") and self._id:
            self._generator.cancel(self._id)

    def flush(self) -> None:
        """Sends what the reader takes."""
        if not self._is_open:
            return
        exchange = self._exchange
        if self._prompt is not None and exchange.credit:
            prompt, self._prompt = self._prompt, None
            exchange.push(prompt.to_bytes())
        if self._waiting is not None and self._prompt is None and exchange.credit:
            advance, self._waiting = self._waiting, None
            exchange.push(delta_bytes(advance))
        if self._finish is not None and self._waiting is None and self._prompt is None and exchange.credit:
            exchange.push(finished_bytes(self._finish))
            self._close()
            exchange.reply(b"", ())

    def _close(self, error: str = "") -> bool:
        """False where it was closed before."""
        was_open, self._is_open = self._is_open, False
        if was_open:
            self._on_closed()
            if self._trace is not None:
                self._trace.closed(error)
        return was_open


class _Awaited:
    """A listener that only waits for the end."""

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done

    def advanced(self, advance: Advance) -> None:
        return

    def finished(self, finish: Finish) -> None:
        self.done.set_result(None)

    def failed(self, error: TensorwayError) -> None:
        self.done.set_exception(error)


def _text_of(engine: GenerationEngine) -> TextSide:
    if engine.text is None:
        raise FailedPrecondition("the model is not loaded")
    return engine.text
