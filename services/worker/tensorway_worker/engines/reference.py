"""The uncut model as the measure of a cut one.

    python -m tensorway_worker.engines.reference MODEL_DIR --inputs IN.safetensors --outputs OUT.safetensors [--device cpu] [--threads 1]

runs the whole model on a sample in a process of its own, whose memory is gone when it ends. `compare` says whether a group's outputs are
the same.

What "the same" means. A pipeline computes what the whole model computes, operation by operation, so its outputs are equal bit by bit,
provided that both run with the same number of torch threads (a sum over threads is another sum) and on the same rows at once (a matrix
product of 8 rows may be computed in another order than one of 4): compare the sample as one batch, not cut into micro-batches, with the
group's threads. Tensor shards add partial sums in another order: equal within the tolerance of the outputs' own precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from tensorway.errors import FailedPrecondition, TensorwayError
from tensorway.model import Inputs, Outputs
from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import model_error

#: Largest difference that tensor shards may make: absolute for values below 1, relative above. The weights' precision counts: bfloat16 has
#: 8 bits of mantissa, float16 11, and dozens of layers add up.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {
    torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2,
}
_OF_WEIGHTS: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def compare(own: Outputs, reference: Outputs, num_shards: int, weights_dtype: str = "keep") -> str | None:
    """None where a cut model's outputs are the uncut one's, else a sentence that names the output and the largest difference.

    Args:
        num_shards: 1 asks for equal bits; more for equality within `TOLERANCE` (integers, booleans: exactly).
        weights_dtype: of model.yaml; weights of less precision than the outputs widen the tolerance.
    """
    if own.keys() != reference.keys():
        return f"the cut model returns {sorted(own)}, the uncut one {sorted(reference)}"
    for name, wanted in reference.items():
        found = own[name]
        if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
            if list(found) != list(wanted):
                return f"output {name} differs from the uncut model's"
            continue
        said = _difference(name, found.cpu(), wanted.cpu(), num_shards, weights_dtype)
        if said is not None:
            return said
    return None


def _difference(name: str, found: torch.Tensor, wanted: torch.Tensor, num_shards: int, weights_dtype: str) -> str | None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"output {name} is {found.dtype} {list(found.shape)}, the uncut model's {wanted.dtype} {list(wanted.shape)}"
    is_same = (found == wanted) | (found.isnan() & wanted.isnan())
    if bool(is_same.all()):
        return None
    gap = (found.double() - wanted.double()).abs()
    limit = 0.0
    if num_shards > 1 and wanted.is_floating_point():
        limit = max(TOLERANCE[wanted.dtype], TOLERANCE[_OF_WEIGHTS.get(weights_dtype, wanted.dtype)])
        is_same |= gap <= limit * wanted.double().abs().clamp(min=1.0)
        if bool(is_same.all()):
            return None
    # What is no number on one side only is the largest difference there is.
    worst = gap.masked_fill(is_same, 0.0).nan_to_num(nan=float("inf")).max().item()
    allowed = f"within {limit:g}" if limit else "bit by bit"
    count = int((~is_same).sum())
    return f"output {name} is not the uncut model's {allowed}: {count} of {wanted.numel()} values differ, by up to {worst:.3g}"


def save_values(values: Inputs, path: Path) -> None:
    """Writes tensors by name for the reference process. Raises FailedPrecondition for BYTES."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise FailedPrecondition(f"{name} holds BYTES, which the reference cannot be given", field=name)
        tensors[name] = value.contiguous()
    save_file(tensors, path)


def load_values(path: Path) -> Inputs:
    """The counterpart of `save_values`."""
    from safetensors.torch import load_file

    return dict(load_file(path))


def reference_outputs(path: Path, inputs: Inputs, device: str) -> Outputs:
    """One step of the whole model in `path`, in this process. `inputs` as the model's `run` takes them, outputs on the CPU."""
    directory = load_directory(path)
    try:
        engine = open_engine(directory, device)
        engine.load()
        given: Inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        with torch.inference_mode():
            outputs = engine.run(given)
    except Exception as error:
        raise model_error(error, path, "the uncut model") from error
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring. Returns the exit status; what went wrong is one sentence on standard error."""
    parser = argparse.ArgumentParser("tensorway_worker.engines.reference", description="Runs the uncut model on a sample.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--inputs", type=Path, required=True, help="safetensors file: what the model's forward takes")
    parser.add_argument("--outputs", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        save_values(reference_outputs(given.model_dir, load_values(given.inputs), given.device), given.outputs)
    except TensorwayError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
