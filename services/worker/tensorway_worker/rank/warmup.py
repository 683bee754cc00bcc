"""Steps on made-up inputs before the first caller comes: kernels are chosen, memory is taken, and a model that cannot run is found out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Final

import torch

from tensorway.errors import CallerError, OutOfMemory, TensorwayError
from tensorway.model import Inputs
from tensorway.model_directory import ModelDirectory
from tensorway.signature import ROWS, RevisionSpec, TensorSpec
from tensorway.tensors import ITEM_SIZE, DataType, encode_bytes, num_elements
from tensorway_worker.engines.port import Engine
from tensorway_worker.rank.batch import Request
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.launch import RankLaunch
from tensorway_worker.rank.layout import Layouts
from tensorway_worker.rank.solo import SoloGroup
from tensorway_worker.rank.step import BatchRunner
from tensorway_worker.rank.verification import verify

_LOG = logging.getLogger(__name__)

#: Extent of a dimension that varies.
_EXTENT: Final = 8
_DEADLINE_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Warming:
    """The leader's first steps: in the torch thread, or in a conductor's where the group has several ranks."""

    engine: Engine
    directory: ModelDirectory
    runner: BatchRunner
    group: LinkedGroup | SoloGroup

    def run(self, launch: RankLaunch | None = None) -> None:
        """One step of 1 row, one of 2 and one of `max_rows`. Raises what the model raises; where `launch` asks for it, compares the outputs
        of the group with those of the uncut model, and raises FailedPrecondition where they differ.

        A model may refuse made-up inputs as a caller's fault (zero bytes are no picture): that is not a failure.
        """
        spec = self.directory.spec
        # The memory guard learns from the first two what the last will take, before it takes it.
        sizes = sorted({1, min(2, spec.batching.max_rows), spec.batching.max_rows}) if spec.signature.is_batchable else [1]
        for rows in sizes:
            try:
                self._step(rows)
            except OutOfMemory as error:
                if rows == 1:
                    raise
                # Smaller batches are served: one that does not fit is split (`step.py`).
                _LOG.warning("a step of max_rows=%d does not fit: %s", rows, error.message, extra={"fields": {"model": spec.model}})
        if launch is not None and launch.verify and isinstance(self.group, LinkedGroup):
            verify(self.engine, self.directory, launch, self.group)

    def _step(self, rows: int) -> None:
        example = self.engine.example(rows)
        if example is not None:
            self.group.run(_on_device(example, self.engine.device))
            return
        staged = self.runner.stage([zero_request(self.directory.spec, rows, self.runner)])
        self.runner.run(staged)
        (result,) = self.runner.finish(staged)
        if isinstance(result, CallerError):
            _LOG.info("the model refused the warm-up: %s", result.message)
        elif isinstance(result, TensorwayError):
            raise result


def zero_request(spec: RevisionSpec, rows: int, runner: BatchRunner) -> Request:
    """A request of zeros (BYTES: empty strings) that fits the signature."""
    contents = [_zeros(tensor, rows) for tensor in spec.signature.inputs]
    specs = zip(spec.signature.inputs, contents, strict=True)
    key = tuple((tensor.name, int(tensor.dtype), shape, len(data)) for tensor, (shape, data) in specs)
    layout = Layouts(spec.signature, runner.padding).of(key)
    if layout.error is not None:
        raise layout.error
    return Request("warm-up", layout, tuple((data,) for _, data in contents), (), {}, time.monotonic() + _DEADLINE_S)


def _zeros(spec: TensorSpec, rows: int) -> tuple[tuple[int, ...], bytes]:
    shape = tuple(extent if isinstance(extent, int) else rows if extent == ROWS else _EXTENT for extent in spec.shape)
    count = num_elements(shape, spec.name)
    if spec.dtype is DataType.BYTES:
        return shape, encode_bytes([b""] * count)
    return shape, bytes(count * ITEM_SIZE[spec.dtype])


def _on_device(inputs: Inputs, device: str) -> Inputs:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
