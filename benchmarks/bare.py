"""The bare model's own best batched rate: the same engine in one process, no mesh, with the same threads.

    python -m benchmarks.bare MODEL_DIR THREADS SECONDS BATCH_SIZE [BATCH_SIZE …]

Prints one JSON object: rows per second by batch size. Inputs lie ready as torch tensors, so nothing but the model's step is counted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from tensorway.model_directory import ModelDirectory, load_directory
from tensorway_worker.engines import open_engine

EXTENT = 32


def example(directory: ModelDirectory, rows: int) -> dict[str, torch.Tensor]:
    """Inputs like the workload's: ids of a vocabulary, a full mask, normal pixels."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    for spec in directory.yaml.inputs:
        shape = [rows if extent == "rows" else EXTENT if isinstance(extent, str) else extent for extent in spec.shape]
        if spec.dtype == "INT64":
            ids = torch.randint(1000, 28000, shape, generator=generator)
            inputs[spec.name] = torch.ones_like(ids) if "mask" in spec.name else ids
        else:
            inputs[spec.name] = torch.randn(shape, generator=generator)
    return inputs


def rate(path: Path, threads: int, seconds: float, sizes: list[int]) -> dict[int, float]:
    """Rows per second by batch size."""
    torch.set_num_threads(threads)
    directory = load_directory(path)
    engine = open_engine(directory, "cpu")
    engine.load()
    rates: dict[int, float] = {}
    with torch.inference_mode():
        for size in sizes:
            inputs = example(directory, size)
            for _ in range(2):
                engine.run(inputs)
            steps, started_s = 0, time.monotonic()
            while time.monotonic() - started_s < seconds:
                engine.run(inputs)
                steps += 1
            rates[size] = steps * size / (time.monotonic() - started_s)
    return rates


if __name__ == "__main__":
    print(json.dumps(rate(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), [int(size) for size in sys.argv[4:]])))
