"""One step run in the torch thread for a thread that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from tensorway.model import Inputs, Outputs
from tensorway_worker.rank.executor import Executor


def run_in(executor: Executor, run: Callable[[Inputs], Outputs], carry: Inputs) -> Outputs:
    """Runs a step in the torch thread and waits for it; the outputs on the CPU."""
    done: Future[Outputs] = Future()
    executor.enqueue(partial(_run_into, done, run, carry))
    return done.result()


def _run_into(done: Future[Outputs], run: Callable[[Inputs], Outputs], carry: Inputs) -> None:
    """In the torch thread."""
    try:
        outputs = on_host(run(carry))
    except Exception as error:  # noqa: BLE001 - raised again where the outcome is awaited
        done.set_exception(error)
    else:
        done.set_result(outputs)


def on_host(outputs: Outputs) -> Outputs:
    """The same, on the CPU."""
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
