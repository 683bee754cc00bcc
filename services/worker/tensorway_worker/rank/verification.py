"""At load: the outputs of a cut model beside those of the uncut one, on a sample, before anybody is served.

The uncut model runs in a process of its own, which takes its memory with it when it ends. Where the machine has not room for it, the
comparison is left out, and the log says so.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.port import Engine
from tensorway_worker.engines.reference import compare, load_values, save_values
from tensorway_worker.engines.samples import sample_inputs
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.launch import RankLaunch

_LOG = logging.getLogger(__name__)
_ROWS: Final = 2
#: The uncut model takes this much more than its weights: libraries, activations, what loading holds twice.
_ROOM_FACTOR: Final = 1.5
_ROOM_BYTES: Final = 512 << 20
_SHOWN_CHARS: Final = 500


def verify(engine: Engine, directory: ModelDirectory, launch: RankLaunch, group: LinkedGroup) -> None:
    """The leader's, in a conductor's thread. Raises FailedPrecondition, naming the output and the difference, where the group computes
    something else than the model, or the uncut model cannot be run although model.yaml says `verify: always`."""
    is_asked_for = directory.yaml.parallel.verify == "always"
    needed = int(engine.memory_bytes() * launch.world_size * _ROOM_FACTOR) + _ROOM_BYTES
    room = _room(launch.device)
    if room < needed and not is_asked_for:
        _LOG.warning(
            "not compared with the uncut model: it needs about %d MiB, and %d MiB are free", needed >> 20, room >> 20,
            extra={"fields": {"model": launch.model}},
        )
        return
    sample = sample_inputs(engine, directory.spec, _ROWS)
    with tempfile.TemporaryDirectory(prefix="tensorway-verify-") as folder:
        reference = _reference(Path(folder), directory, launch, sample)
    own = group.run_in_one({name: _on(value, launch.device) for name, value in sample.items()})
    said = compare({**own}, reference, launch.tensor, directory.yaml.weights_dtype)
    if said is not None:
        raise FailedPrecondition(
            f"{launch.model} cut into {launch.pipeline} x {launch.tensor} computes something else than the whole: {said}; leave `parallel` "
            "out, or cut it otherwise",
            field="parallel",
        )
    _LOG.info("compared with the uncut model", extra={"fields": {"model": launch.model, "rows": _ROWS}})


def _reference(folder: Path, directory: ModelDirectory, launch: RankLaunch, sample: Inputs) -> Inputs:
    """What the uncut model makes of the sample. Raises FailedPrecondition with its last words where it fails."""
    inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
    save_values(sample, inputs)
    command = [
        sys.executable, "-m", "tensorway_worker.engines.reference", str(directory.path), "--inputs", str(inputs), "--outputs", str(outputs),
        "--device", launch.device, "--threads", str(launch.threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-_SHOWN_CHARS:] or f"it exited with status {done.returncode}"
        raise FailedPrecondition(f"the uncut model could not be run for comparison: {said}", field="parallel.verify")
    return load_values(outputs)


def _on(value: object, device: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise FailedPrecondition("BYTES cannot be sent to other ranks; turn it into tensors in preprocess", field="inputs")
    return value.to(device)


def _room(device: str) -> int:
    """Bytes free for another process."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
