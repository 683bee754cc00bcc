"""One batch through the model: stage (preprocess, join) → run (the steps) → finish (postprocess, check, cut).

`stage` and `finish` touch no model weights and may run in a staging thread; `run` belongs to the rank's torch thread. What goes wrong with
one request is that request's result; the others never notice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from tensorway.errors import DeadlineExceeded, InvalidRequest, ModelFailed, TensorwayError
from tensorway.model import Inputs, Outputs
from tensorway.signature import RevisionSpec
from tensorway_worker.engines.port import Engine, model_error
from tensorway_worker.rank.batch import Prepared, Request, as_received, group, join, preprocessed
from tensorway_worker.rank.explain import Explainer
from tensorway_worker.rank.group_port import GroupLost, StepRunner
from tensorway_worker.rank.outputs import Answer, OutputRules, cut_rows, to_host, unchecked_answer
from tensorway_worker.rank.step_trace import log_fields

_LOG = logging.getLogger(__name__)

#: What a request's deadline is blamed on when it passes here.
HOP: Final = "group"


@dataclass(slots=True)
class Step:
    """Requests that run together. `inputs` is None until joined; joining again gives fresh tensors."""

    prepared: list[Prepared]
    inputs: Inputs | None = None


@dataclass(slots=True)
class Staged:
    """One batch on its way through the model."""

    #: By position in the batch; None until known.
    results: list[Answer | TensorwayError | None]
    steps: list[Step]
    #: Steps that ran, with their outputs on the CPU.
    ran: list[tuple[list[Prepared], Outputs]] = field(default_factory=list)


class BatchRunner:
    """Takes batches of one revision through its engine."""

    def __init__(self, engine: Engine, spec: RevisionSpec, directory: Path, run_step: StepRunner, explainer: Explainer) -> None:
        self.rules = OutputRules(spec.signature)
        self.padding: Mapping[str, float] = {**{rule.input: rule.value for rule in spec.batching.padding}, **engine.padding}
        self._engine = engine
        self._directory = directory
        self._run_step = run_step
        self._explainer = explainer
        self._is_batchable = spec.signature.is_batchable
        threads = engine.preprocess_threads if engine.has_preprocess else 1
        self._pool = ThreadPoolExecutor(threads, "preprocess") if threads > 1 else None

    def close(self) -> None:
        """Ends its threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def stage(self, requests: Sequence[Request | TensorwayError]) -> Staged:
        """Preprocesses and joins. Whatever is wrong with a request is its result from here on."""
        staged = Staged([None] * len(requests), [])
        readable: list[tuple[int, Request]] = []
        for index, request in enumerate(requests):
            if isinstance(request, TensorwayError):
                staged.results[index] = request
            else:
                readable.append((index, request))
        prepared: list[Prepared] = []
        for (index, _), outcome in zip(readable, self._prepare_all(readable), strict=True):
            if isinstance(outcome, Prepared):
                prepared.append(outcome)
            else:
                staged.results[index] = outcome
        staged.steps = [Step(items) for items in group(prepared, self._is_batchable)]
        # The first is joined ahead; any other when its turn comes, so that a batch that fell apart does not hold all its tensors twice.
        if staged.steps:
            self._join(staged, staged.steps[0])
        return staged

    def _prepare_all(self, readable: Sequence[tuple[int, Request]]) -> list[Prepared | Answer | TensorwayError]:
        if self._pool is not None and len(readable) > 1:
            return list(self._pool.map(self._prepare, readable))
        return [self._prepare(one) for one in readable]

    def _prepare(self, one: tuple[int, Request]) -> Prepared | Answer | TensorwayError:
        index, request = one
        try:
            if not self._engine.has_preprocess:
                prepared = as_received(index, request)
            else:
                values = self._engine.preprocess(request.values(), request.parameters)
                prepared = preprocessed(index, request, values, self._is_batchable, self.padding)
            # Many a network cannot cope with no rows at all, and none needs to.
            return (None if prepared.rows else self.rules.empty(request)) or prepared
        except Exception as error:  # noqa: BLE001 - an author's code raises anything; it is the request's result
            return model_error(error, self._directory, "preprocess")

    def _join(self, staged: Staged, step: Step) -> bool:
        try:
            step.inputs = join(step.prepared, self.padding, self._engine.device)
        except Exception as error:  # noqa: BLE001 - becomes the requests' result
            self._fail(staged, step.prepared, model_error(error, self._directory, "joining the batch"))
            step.prepared = []
            return False
        return True

    def run(self, staged: Staged) -> None:
        """Runs every step, in the torch thread. Requests whose deadline has passed are left out."""
        for step in staged.steps:
            self._run(staged, step)

    def _run(self, staged: Staged, step: Step) -> None:
        num_staged = len(step.prepared)
        if num_staged:
            self._drop_expired(staged, step)
        if not step.prepared:
            return
        # Tensors joined with a request that is gone, or not yet at all, are joined (again) without it.
        if (step.inputs is None or len(step.prepared) != num_staged) and not self._join(staged, step):
            return
        failure = self._try(staged, step)
        if failure is not None:
            # Only now, outside of the handler, is the failed step's memory free for its halves.
            self._after_failure(staged, step, failure)

    def _try(self, staged: Staged, step: Step) -> TensorwayError | None:
        inputs, step.inputs = step.inputs, None
        order = step.prepared[0].request.explain
        try:
            outputs = self._run_step(inputs or {}) if order is None else self._explainer.explain(inputs or {}, order)
            staged.ran.append((step.prepared, to_host(outputs)))
        except Exception as error:
            if is_fatal(error):
                raise
            return model_error(error, self._directory, "forward")
        return None

    def _after_failure(self, staged: Staged, step: Step, failure: TensorwayError) -> None:
        """Looks for the guilty request by halves, so that it fails alone."""
        if len(step.prepared) == 1:
            self._fail(staged, step.prepared, failure)
            return
        middle = len(step.prepared) // 2
        for half in (step.prepared[:middle], step.prepared[middle:]):
            self._run(staged, Step(half))

    def _drop_expired(self, staged: Staged, step: Step) -> None:
        now_s = time.monotonic()
        if min([item.request.deadline_s for item in step.prepared]) > now_s:
            return
        late = [item for item in step.prepared if item.request.deadline_s <= now_s]
        self._fail(staged, late, DeadlineExceeded("the deadline passed while the request waited for its step", hop=HOP))
        step.prepared = [item for item in step.prepared if item.request.deadline_s > now_s]

    def finish(self, staged: Staged) -> list[Answer | TensorwayError]:
        """Each request's answer or error, in batch order."""
        for prepared, outputs in staged.ran:
            try:
                self._finish(staged, prepared, outputs)
            except Exception as error:  # noqa: BLE001 - becomes the requests' result
                self._fail(staged, prepared, model_error(error, self._directory, "the model's outputs"))
        staged.ran.clear()
        return [result if result is not None else _unanswered() for result in staged.results]

    def _finish(self, staged: Staged, prepared: list[Prepared], outputs: Outputs) -> None:
        if prepared[0].request.explain is not None:
            staged.results[prepared[0].place] = unchecked_answer(outputs)
            return
        if not self._engine.has_postprocess:
            for item, answer in zip(prepared, self.rules.split(outputs, prepared), strict=True):
                staged.results[item.place] = answer
            return
        parts = cut_rows(outputs, prepared) if self._is_batchable else [outputs]
        for item, part in zip(prepared, parts, strict=True):
            staged.results[item.place] = self._postprocess(item, part)

    def _postprocess(self, item: Prepared, part: Outputs) -> Answer | TensorwayError:
        try:
            return self.rules.answer(self._engine.postprocess(part, item.request.parameters), item.request)
        except Exception as error:  # noqa: BLE001 - an author's code raises anything; it is the request's result
            return model_error(error, self._directory, "postprocess")

    def _fail(self, staged: Staged, prepared: Sequence[Prepared], failure: TensorwayError) -> None:
        for item in prepared:
            staged.results[item.place] = failure
            if not isinstance(failure, InvalidRequest | DeadlineExceeded):
                _LOG.warning("request failed: %s", failure.message, extra={"fields": log_fields(item.request.request_id)})


def is_fatal(error: Exception) -> bool:
    """True where the whole rank is of no more use: its device or its group is lost."""
    return isinstance(error, GroupLost | torch.AcceleratorError)


def _unanswered() -> TensorwayError:
    return ModelFailed("the step ended without an answer for this request")
