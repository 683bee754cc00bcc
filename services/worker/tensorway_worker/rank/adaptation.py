"""A rank that trains instead of serving: what its node has ordered, from the first step to the files of the new model.

The leader reads the request from the job's folder, leads one step after another, and writes the files; its news travel in its statuses.
Every other rank does what the leader says. The node ends them all.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import torch

from tensorway.errors import CallerError, FailedPrecondition, InvalidRequest, TensorwayError
from tensorway.model import Value
from tensorway.model_directory import FILES_DIR, ModelDirectory
from tensorway.tensors import Tensor
from tensorway_worker.adaptation_news import MODEL_FOLDER, REQUEST_FILE, Gathering, Outcome, failure_of
from tensorway_worker.adaptation_wire import AdaptOrder, read_order
from tensorway_worker.engines.port import Engine, model_error
from tensorway_worker.engines.rewriting import Adaptable
from tensorway_worker.rank.adaptation_files import Trained, no_room, write_files
from tensorway_worker.rank.adaptation_linked import LinkedTraining
from tensorway_worker.rank.adaptation_losses import row_batches
from tensorway_worker.rank.adaptation_share import LOSS, Share, Wish
from tensorway_worker.rank.collective import SingleShard
from tensorway_worker.rank.executor import Executor
from tensorway_worker.rank.group_port import GroupLost
from tensorway_worker.rank.layout import Layouts
from tensorway_worker.rank.pending import Named
from tensorway_worker.rank.received import value_of
from tensorway_worker.topology import Place

_LOG = logging.getLogger(__name__)
#: News of steps are told at most this often.
_NEWS_S: Final = 0.05


class Training(Protocol):
    """All ranks of a group as the leader's loop sees them."""

    def begin(self, wish: Wish) -> tuple[set[str], dict[str, int]]: ...

    def step(self, inputs: Named, targets: Named) -> float: ...

    def save(self, folder: Path) -> None: ...


class SoloTraining:
    """Implements `Training` for a model that lives in this rank alone. In the torch thread."""

    def __init__(self, engine: Engine) -> None:
        self._share = Share(engine, Place(), SingleShard())

    def begin(self, wish: Wish) -> tuple[set[str], dict[str, int]]:
        return self._share.begin(wish)

    def step(self, inputs: Named, targets: Named) -> float:
        loss = float(self._share.forward(inputs, targets)[LOSS])
        self._share.backward({})
        self._share.update((), lambda _, own: own)
        return loss

    def save(self, folder: Path) -> None:
        self._share.save(folder, 0)


@dataclass(slots=True)
class Adaptation:
    """The leader's loop. `run` in the torch thread, or in one of its own where the group has several ranks."""

    folder: Path
    directory: ModelDirectory
    engine: Engine
    training: Training
    executor: Executor
    #: Called from any thread, after `news` has changed.
    on_news: Callable[[Callable[[Gathering], None]], None]

    def run(self) -> None:
        """From the request to the files; every failure but a lost group becomes news."""
        try:
            # The torch thread's own inference mode would make tensors that no gradient can pass.
            with torch.inference_mode(False), torch.no_grad():
                outcome = self._adapted()
        except GroupLost:
            raise
        except Exception as error:  # noqa: BLE001 - a model raises anything; the caller is told
            said = model_error(_plain(error, self.folder), self.directory.path, "training")
            _LOG.info("the adaptation failed: %s", said)
            self._tell(failure=failure_of(said))
        else:
            self._tell(outcome=outcome)

    def _adapted(self) -> Outcome:
        order = read_order((self.folder / REQUEST_FILE).read_bytes())
        inputs, targets = examples(order, self.directory, self.engine)
        chosen, sizes = self.training.begin(Wish(order.loss, order.optimizer, order.learning_rate, order.only))
        for pattern in order.only:
            if pattern not in chosen:
                raise InvalidRequest(f"only: no floating-point parameter is called {pattern!r}", field="only")
        num_elements = sum(sizes.values())
        if not num_elements:
            raise FailedPrecondition("the model has no floating-point parameter to train", field="model")
        self._tell(detail=f"training {num_elements:,} numbers of {self.directory.yaml.name}")
        losses = self._steps(order, inputs, targets)
        self._tell(is_writing=True, detail="writing the weights")
        self.training.save(self.folder)
        files = self.folder / MODEL_FOLDER / FILES_DIR
        files.mkdir(parents=True)
        assert isinstance(self.engine, Adaptable)
        rewriting = self.engine.rewriting()
        hashes = write_files(rewriting, Trained(self.folder), files)
        return Outcome(hashes, rewriting.dropped, dict(rewriting.settings), losses, num_elements)

    def _steps(self, order: AdaptOrder, inputs: Named, targets: Named) -> tuple[float, float]:
        """All steps; the losses of the first and the last."""
        rows = min(order.batch_rows or self.directory.yaml.batching.max_rows, order.num_rows)
        batches = row_batches(order.num_rows, rows, order.seed)
        first = last = 0.0
        for number in range(1, order.num_steps + 1):
            chosen = next(batches)
            device = self.engine.device
            began_s = self.executor.begin_step()
            try:
                last = self.training.step(_rows(inputs, chosen, device), _rows(targets, chosen, device))
            finally:
                self.executor.end_step(began_s)
            if not math.isfinite(last):
                raise FailedPrecondition(
                    f"the loss of step {number} is {last}: a smaller learning_rate than {order.learning_rate:g} may help",
                    field="learning_rate",
                )
            first = last if number == 1 else first
            self._tell(step=(number, last))
        return first, last

    def _tell(self, step: tuple[int, float] | None = None, **changes: object) -> None:
        def apply(news: Gathering) -> None:
            if step is not None:
                news.steps.append(step)
            for name, value in changes.items():
                setattr(news, name, value)

        self.on_news(apply)


def examples(order: AdaptOrder, directory: ModelDirectory, engine: Engine) -> tuple[Named, Named]:
    """All examples as `forward` takes them, and their targets; on the CPU, dimension 0 = rows.

    Raises InvalidRequest where they break the signature, or what `preprocess` raises.
    """
    signature = directory.spec.signature
    if not signature.is_batchable:
        raise FailedPrecondition("the model's inputs have no `rows`: there is nothing to make batches of", field="inputs")
    key = tuple((one.name, int(one.dtype), one.shape, len(one.data)) for one in order.inputs)
    layout = Layouts(signature, ()).of(key)
    if layout.error is not None:
        raise layout.error
    inputs = {one.name: _value(one, "inputs") for one in order.inputs}
    if engine.has_preprocess:
        inputs = engine.preprocess(inputs, {})
    targets = {one.name: _value(one, "targets") for one in order.targets}
    return _with_rows(inputs, order.num_rows, "inputs"), _with_rows(targets, order.num_rows, "targets")


def _value(tensor: Tensor, where: str) -> Value:
    return value_of(tensor.dtype, tensor.shape, (tensor.data,), f"{where}.{tensor.name}")


def _with_rows(values: Mapping[str, Value], num_rows: int, where: str) -> Named:
    found: Named = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidRequest(f"{where}: {name} holds BYTES, which cannot be trained with", field=where)
        if value.dim() == 0 or len(value) != num_rows:
            raise InvalidRequest(f"{where}: {name} has shape {list(value.shape)} after preprocess, not {num_rows} rows", field=where)
        found[name] = value
    return found


def _rows(values: Named, chosen: torch.Tensor, device: str) -> Named:
    return {name: value[chosen].to(device) for name, value in values.items()}


def _plain(error: Exception, folder: Path) -> Exception:
    return error if isinstance(error, (CallerError, TensorwayError)) else no_room(error, folder)


@dataclass(slots=True)
class NewsDesk:
    """Takes the leader's news from its thread into the loop, and has them told: steps a few at a time, everything else at once."""

    tell: Callable[[], None]
    gathering: Gathering = field(default_factory=Gathering)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _timer: asyncio.TimerHandle | None = None

    def put(self, apply: Callable[[Gathering], None]) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._apply, apply)

    def _apply(self, apply: Callable[[Gathering], None]) -> None:
        apply(self.gathering)
        if self._timer is None:
            self._timer = self._loop.call_later(_NEWS_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self.tell()


def started(
    folder: Path, directory: ModelDirectory, engine: Engine, linked: LinkedTraining | None, executor: Executor, desk: NewsDesk
) -> asyncio.Future[None]:
    """The leader's loop on its way: in a thread of its own where steps are only led from here, else in the torch thread."""
    training: Training = SoloTraining(engine) if linked is None else linked
    adaptation = Adaptation(folder, directory, engine, training, executor, desk.put)
    if linked is None:
        return executor.run(adaptation.run)
    return asyncio.get_running_loop().run_in_executor(None, adaptation.run)
