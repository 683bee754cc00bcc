"""The threads that make a group's answers: schedule, step, hand out, again.

    loop's thread                          window threads (one for each pipeline stage)
    submit, cancel ──▶ inbox ──▶ scheduler.next() ──▶ run_step (the group's ranks) ──▶ scheduler.back()
    listeners ◀── all that a step drew, in one call of the loop ──┘

While a step runs nobody waits for it but its own thread; whatever comes meanwhile is part of the next one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Final, cast

from tensorway.errors import DeadlineExceeded, InvalidRequest, TensorwayError, Unavailable
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.generation.answer import Answer, Listener
from tensorway_worker.engines.generation.layout import carried
from tensorway_worker.engines.generation.pace import Pace
from tensorway_worker.engines.generation.requests import GenerationRequest, Logprob
from tensorway_worker.engines.generation.sampler import RowToDraw, Sampled, SamplingRows
from tensorway_worker.engines.generation.scheduler import Row, Scheduler, Step
from tensorway_worker.engines.generation.text import TextSide

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)
HOP: Final = "group"

#: Something to tell a listener, in the loop.
News = Callable[[], None]


class Generator:
    """All answers of one group. Public methods are for the loop's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        text: TextSide,
        max_context: int,
        run_step: Callable[[Inputs], Outputs],
        fail: Callable[[Exception], TensorwayError],
        windows: int = 1,
    ) -> None:
        """
        Args:
            max_context: tokens of a prompt and its answer.
            run_step: one step of the group; blocks until it is done.
            fail: what an exception of `run_step` means to those whose step it was; raises it again where it is the group's end.
            windows: steps on their way at once.
        """
        self._scheduler = scheduler
        self._text = text
        self._max_context = max_context
        self._run_step = run_step
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._pace = Pace()
        self._answers: dict[int, Answer] = {}
        self._ids = count(1)
        self._inbox: deque[Callable[[], None]] = deque()
        self._turn = threading.Condition()
        #: What is said to whoever waits at the end, and to whoever comes after it; None until then.
        self._closing: TensorwayError | None = None
        #: Threads that wait for something to do.
        self._num_idle = 0
        self.num_steps = 0
        self.num_tokens = 0
        self._threads = [threading.Thread(target=self._serve, name=f"generation-{number}", daemon=True) for number in range(windows)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads after the steps that are on their way; does not wait. Answers that are being made fail."""
        with self._turn:
            self._shut(Unavailable("the group is stopping"))
            self._turn.notify_all()

    @property
    def num_answers(self) -> int:
        """Running and waiting."""
        return len(self._answers)

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_free_blocks(self) -> int:
        return self._scheduler.num_free_blocks

    def submit(self, request: GenerationRequest, listener: Listener) -> int:
        """Has one more answer made; returns its id. Raises InvalidRequest for a prompt that leaves no room for an answer."""
        most = self._max_context - 1
        if len(request.prompt_ids) > most:
            raise InvalidRequest(f"the prompt has {len(request.prompt_ids)} tokens, and the model takes {most}", field="prompt")
        id = next(self._ids)
        self._post(partial(self._begin, id, request, listener))
        return id

    def cancel(self, id: int) -> None:
        """Nobody wants it any more: its place is free with the next step, and its listener hears nothing more of it."""
        self._post(partial(self._forget, id))

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        # The lock only where somebody sleeps: the loop must not wait for a step to be planned.
        if self._num_idle:
            with self._turn:
                self._turn.notify()
        # No thread reads the inbox any more. Read after the append as `_shut` reads the inbox after it closed: one of both sees it.
        if self._closing is not None:
            with self._turn:
                self._sweep(self._closing)

    # What follows happens in the window threads, under the lock but for the step itself.

    def _serve(self) -> None:
        while True:
            with self._turn:
                step = self._await_step()
                if step is None:
                    return
                carry, drawing = self._carry(step)
            began_s = time.monotonic()
            try:
                outputs = self._run_step(carry)
            except Exception as error:  # noqa: BLE001 - becomes the outcome of those whose step it was
                with self._turn:
                    is_over = not self._lost(step, error)
                    self._turn.notify_all()
                if is_over:
                    return
                continue
            with self._turn:
                self._pace.observe(step.num_tokens, time.monotonic() - began_s)
                self._back(step, drawing, outputs)
                self._turn.notify_all()

    def _await_step(self) -> Step | None:
        """The next step as soon as there is one; None where the generator is closed."""
        while self._closing is None:
            self._read_inbox()
            earliest_s = self._expire(time.monotonic())
            step = self._scheduler.next(self._pace.prefill_tokens(self._scheduler.num_decoding))
            if step is not None:
                return step
            self._num_idle += 1
            if not self._inbox:
                self._turn.wait(None if earliest_s is None else max(0.0, earliest_s - time.monotonic()))
            self._num_idle -= 1
        return None

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _shut(self, closing: TensorwayError) -> None:
        """No step begins any more, and nobody is left waiting: neither those who run or wait nor those still in the inbox."""
        self._closing = self._closing or closing
        self._sweep(self._closing)

    def _sweep(self, closing: TensorwayError) -> None:
        self._read_inbox()
        self._fail_all(list(self._answers.values()), closing)

    def _fail_all(self, answers: Iterable[Answer], failure: TensorwayError) -> None:
        news: list[News] = []
        for answer in answers:
            self._end(answer, partial(answer.listener.failed, failure), news)
        self._deliver(news)

    def _begin(self, id: int, request: GenerationRequest, listener: Listener) -> None:
        try:
            answer = Answer(request, self._text, self._max_context, id, listener)
            finish = answer.replay()
        except TensorwayError as error:
            self._deliver([partial(listener.failed, error)])
            return
        except Exception:  # noqa: BLE001 - one answer's bug is not the others'
            _LOG.exception("an answer could not be begun", extra={"fields": {"request_id": request.request_id}})
            self._deliver([partial(listener.failed, Unavailable("the answer could not be begun; see the group's log"))])
            return
        if finish is not None:
            self._deliver([partial(listener.finished, finish)])
            return
        self._answers[id] = answer
        self._scheduler.add(answer.sequence)

    def _forget(self, id: int) -> None:
        answer = self._answers.pop(id, None)
        if answer is not None:
            self._scheduler.drop(answer.sequence)

    def _expire(self, now_s: float) -> float | None:
        """Ends what is past its deadline; the earliest deadline of the others."""
        late = [answer for answer in self._answers.values() if answer.request.deadline_s <= now_s]
        news: list[News] = []
        for answer in late:
            error = DeadlineExceeded(f"the deadline passed after {len(answer.sequence.ids)} tokens of prompt and answer", hop=HOP)
            self._end(answer, partial(answer.listener.failed, error), news)
        self._deliver(news)
        return min((answer.request.deadline_s for answer in self._answers.values()), default=None)

    def _end(self, answer: Answer, news: News, gathered: list[News]) -> None:
        self._forget(answer.sequence.id)
        gathered.append(news)

    def _carry(self, step: Step) -> tuple[Inputs, list[Row]]:
        drawing = [row for row in step.rows if row.draws]
        draws = [self._row(row) for row in drawing]
        return {**carried(step.rows), **cast("Inputs", SamplingRows.of(draws).to_tensors())}, drawing

    def _row(self, row: Row) -> RowToDraw:
        return self._answers[row.sequence.id].row()

    def _back(self, step: Step, drawing: list[Row], outputs: Outputs) -> None:
        self._scheduler.back(step)
        self.num_steps += 1
        drawn = Sampled.from_tensors(cast("dict[str, torch.Tensor]", outputs))
        tokens: list[int] = drawn.token.tolist()
        self.num_tokens += len(tokens)
        logprobs = _Logprobs(drawn) if drawn.logprob.numel() else None
        news: list[News] = []
        for index, (row, token) in enumerate(zip(drawing, tokens, strict=True)):
            answer = self._answers.get(row.sequence.id)
            if answer is not None:
                self._take(answer, token, None if logprobs is None else logprobs.of(index, answer.request.num_top_logprobs), news)
        self._deliver(news)

    def _take(self, answer: Answer, token: int, logprob: Logprob | None, news: list[News]) -> None:
        advance, finish = answer.take(token, logprob)
        news.append(partial(answer.listener.advanced, advance))
        if finish is None:
            answer.sequence.ids.append(token)
        else:
            self._end(answer, partial(answer.listener.finished, finish), news)

    def _lost(self, step: Step, error: Exception) -> bool:
        """A step failed: so do those whose it was. False where that was the end of the group."""
        self._scheduler.lost(step)
        try:
            failure = self._fail(error)
        except Exception as lost:  # noqa: BLE001 - the rank ends with it; whoever waits is told at once
            self._shut(Unavailable(f"the group was lost: {lost}"))
            return False
        hit = [self._answers.get(row.sequence.id) for row in step.rows]
        self._fail_all([answer for answer in hit if answer is not None], failure)
        return True

    def _deliver(self, news: list[News]) -> None:
        if news:
            self._loop.call_soon_threadsafe(_tell, news)


class _Logprobs:
    """Log-probabilities of a step, read from its tensors once."""

    def __init__(self, drawn: Sampled) -> None:
        self._own: list[float] = drawn.logprob.tolist()
        self._ids: list[list[int]] = drawn.top_ids.tolist()
        self._top: list[list[float]] = drawn.top_logprobs.tolist()

    def of(self, index: int, num_top: int | None) -> Logprob | None:
        if num_top is None:
            return None
        top = zip(self._ids[index][:num_top], self._top[index][:num_top], strict=True) if num_top else ()
        return Logprob(self._own[index], tuple(top))


def _tell(news: list[News]) -> None:
    for one in news:
        try:
            one()
        except Exception:  # noqa: BLE001 - one listener's failure is not another's
            _LOG.exception("a listener of an answer failed")
