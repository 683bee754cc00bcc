"""`python -m tensorway_worker.plan MODEL_DIR …`: one JSON object on standard output; a failure is one sentence on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tensorway.errors import FailedPrecondition, TensorwayError

_DEFAULT_HOP_US: Final = 400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("tensorway_worker.plan", description="Predicts what a cut of a model means for each rank.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--pipeline", type=int, default=0, help="stages; 0: model.yaml's")
    parser.add_argument("--tensor", type=int, default=0, help="shards; 0: model.yaml's")
    parser.add_argument("--rows", type=int, default=0, help="rows of a step; 0: model.yaml's batching.max_rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of a rank; 0: torch's own choice")
    parser.add_argument("--hop-us", type=float, default=_DEFAULT_HOP_US, help="time of one hop or one sum between ranks, microseconds")
    given = parser.parse_args(arguments)
    try:
        print(json.dumps(_plan(given)))
    except TensorwayError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def _plan(given: argparse.Namespace) -> dict[str, object]:
    import torch

    from tensorway.model_directory import load_directory
    from tensorway_worker.engines.port import model_error
    from tensorway_worker.plan.prediction import Wish, planned
    from tensorway_worker.plan.subject import subject_of

    directory = load_directory(given.model_dir)
    if given.threads:
        torch.set_num_threads(given.threads)
    parallel = directory.yaml.parallel
    rows = given.rows or directory.yaml.batching.max_rows
    pipeline, tensor = given.pipeline or parallel.pipeline, given.tensor or parallel.tensor
    if min(rows, pipeline, tensor) < 1 or given.hop_us < 0:
        raise FailedPrecondition("--pipeline, --tensor and --rows must be 1 or more, --hop-us 0 or more", field="plan")
    try:
        uncut, notes = subject_of(directory, given.device, rows)
        with torch.inference_mode(False), torch.no_grad():
            return asdict(planned(uncut, Wish(pipeline, tensor, rows, given.hop_us / 1e6, notes=notes)))
    except Exception as error:
        raise model_error(error, directory.path, "the model") from error


if __name__ == "__main__":
    sys.exit(main())
