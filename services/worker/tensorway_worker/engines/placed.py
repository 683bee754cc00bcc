"""An engine that manages its devices itself: one rank, one transformers model, placed by accelerate over all devices that it sees.

    engine: transformers
    parallel: {custom: 2}          # one rank process that sees two devices
    settings:
      task: embedding
      placement: auto
      max_memory: {0: 10GB, 1: 10GB, cpu: 30GB}    # per device; default: what is free
      offload: true                # what fits nowhere is read from the weights file in every step (default); false refuses to start

accelerate's device map fills the GPUs in order, then the CPU, then `disk`, layer by layer (a layer is never torn), and moves
activations between them. Nothing runs at the same time on two devices: this is a way to hold a model, not to make it faster. What is on
`disk` here is simply not loaded: it is read from the model's own weights file whenever its layer runs, and let go of afterwards.

The port in `port.py` also suits an engine that starts processes of its own, as vLLM does. Such an engine must
- start them in `load`, in the rank's session, and wait there until they serve: a rank that returns from `load` is registered;
- find its devices in what the rank sees (CUDA_VISIBLE_DEVICES is set by the node), and take its own ports from the system, on loopback;
- have them end with the rank, however that ends: keep them in the rank's session and process group, which the node kills as a whole, or
  tie them to it (PR_SET_PDEATHSIG); a rank is killed by SIGKILL where it hangs, so cleaning up in Python is not enough;
- raise from `run` when one of them is gone: better to end the rank, since a group is formed anew and never repaired;
- count their memory in `memory_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import accelerate
import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory

from tensorway.errors import FailedPrecondition
from tensorway.model_directory import ModelDirectory
from tensorway_worker.engines.cut.weights_source import WeightsSource, open_weights
from tensorway_worker.engines.pretrained import Pretrained
from tensorway_worker.engines.tasks import Task
from tensorway_worker.engines.transformers import TransformersEngine

_DISK: Final = "disk"


class PlacedModel(Pretrained):
    """A transformers model that accelerate places; see the module's docstring for its settings."""

    def __init__(self, directory: ModelDirectory, task: Task, device: str) -> None:
        """Reads the settings. Raises FailedPrecondition where they do not fit."""
        super().__init__(directory, task)
        settings = directory.yaml.settings
        if settings.get("placement") != "auto":
            raise FailedPrecondition(f"settings.placement must be auto, got {settings.get('placement')!r}", field="settings.placement")
        if self.is_built_whole:
            raise FailedPrecondition("settings.placement needs weights files, not a seed", field="settings.placement")
        self._name = directory.yaml.name
        self._may_offload = bool(settings.get("offload", True))
        self._max_memory = _max_memory(settings.get("max_memory"), device)
        #: Module -> where accelerate put it: an index of a CUDA device, `cpu` or `disk`; empty until loaded.
        self.device_map: Mapping[str, int | str] = {}

    def whole(self, device: str) -> Any:
        """The model with accelerate's hooks, its weights on their devices."""
        model = self.empty()
        dtype = self._dtype or getattr(model.config, "dtype", None)
        source = open_weights(self.weights or self.files, self._unpickle, model)
        self.device_map = accelerate.infer_auto_device_map(
            model, self._max_memory, no_split_module_classes=list(model._no_split_modules or ()), dtype=dtype
        )
        left = sorted(name or "all of it" for name, place in self.device_map.items() if place == _DISK)
        if left and not self._may_offload:
            raise FailedPrecondition(
                f"{self._name} does not fit into its devices: {', '.join(left)} would have to be read in every step; raise "
                "settings.max_memory, give it more devices, or allow settings.offload",
                field="settings.max_memory",
            )
        stored = _stored_names(model, source)
        _fill(model, source, stored, self.device_map, dtype)
        return _dispatched(model, self.device_map, _Later(source, stored, dtype))


class PlacedEngine(TransformersEngine):
    """The engine `transformers` with a placed model: tasks, text inputs and all else are the same."""

    def __init__(self, directory: ModelDirectory, device: str) -> None:
        """Reads the settings. Raises FailedPrecondition where they do not fit."""
        super().__init__(directory, device)
        self._pretrained = self._placed = PlacedModel(directory, self._task, device)

    @property
    def device_map(self) -> Mapping[str, int | str]:
        """Module -> where accelerate put it: an index of a CUDA device, `cpu` or `disk`; empty until loaded."""
        return self._placed.device_map


class _Later(Mapping[str, torch.Tensor]):
    """The weights that no device holds: those in `cpu` memory, while a GPU computes, and those that are read when they are asked for."""

    def __init__(self, source: WeightsSource, stored: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """`stored`: the model's name of a weight -> the source's."""
        self._source = source
        self._stored = stored
        self._dtype = dtype
        self._held: Mapping[str, torch.Tensor] = {}

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Gives these from memory."""
        self._held = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._held:
            return self._held[name]
        return self._source.load(self._stored[name], None, self._dtype, "cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _max_memory(wanted: object, device: str) -> dict[int | str, int]:
    """Bytes for each device that may be used: a GPU's index, or `cpu`. Raises FailedPrecondition where `wanted` is no such mapping."""
    free: dict[int | str, int] = {name: size for name, size in get_max_memory().items() if device != "cpu" or name == "cpu"}
    if wanted is None:
        return free
    if not isinstance(wanted, Mapping):
        raise FailedPrecondition("settings.max_memory must map devices to sizes, e.g. {0: 10GB, cpu: 30GB}", field="settings.max_memory")
    chosen: dict[int | str, int] = {}
    for name, size in wanted.items():
        if name not in free:
            raise FailedPrecondition(
                f"settings.max_memory: this rank sees no device {name!r}, only {', '.join(map(str, free))}", field="settings.max_memory"
            )
        said = f"settings.max_memory.{name}: {size!r} is no size such as 10GB"
        if not isinstance(size, int | str):
            raise FailedPrecondition(said, field="settings.max_memory")
        try:
            chosen[name] = int(convert_file_size_to_int(size))
        except ValueError as error:
            raise FailedPrecondition(said, field="settings.max_memory") from error
    return chosen


def _place_of(name: str, device_map: Mapping[str, int | str]) -> int | str:
    """Where the tensor `name` goes: the entry of the closest module around it."""
    while name not in device_map:
        if not name:
            raise FailedPrecondition("accelerate left a weight without a device", field="settings.placement")
        name = name.rpartition(".")[0]
    return device_map[name]


def _stored_names(model: Any, source: WeightsSource) -> dict[str, str]:
    """The model's name of a weight -> the file's, which may be that of what it is tied to. Buffers that no file holds keep the value that
    the model's own code gave them. Raises FailedPrecondition for a parameter that the file lacks."""
    there = source.names()
    state = model.state_dict(keep_vars=True)
    stored: dict[str, str] = {}
    for name, tensor in state.items():
        found = next((other for other, value in state.items() if value is tensor and other in there), None)
        if found is not None:
            stored[name] = found
        elif tensor.is_meta:
            raise FailedPrecondition(f"no weights file holds {name}; is it the file of this model?", field="files")
    return stored


def _fill(
    model: Any, source: WeightsSource, stored: Mapping[str, str], device_map: Mapping[str, int | str], dtype: torch.dtype | None
) -> None:
    """Reads every weight straight onto its device, except the parameters that are placed on `disk`."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    made: dict[tuple[str, int | str], torch.Tensor] = {}
    for name, stored_name in stored.items():
        place = _place_of(name, device_map)
        if place == _DISK:
            if name in parameters:
                continue
            place = "cpu"
        if (stored_name, place) not in made:
            value = source.load(stored_name, None, dtype, f"cuda:{place}" if isinstance(place, int) else place)
            made[stored_name, place] = torch.nn.Parameter(value, requires_grad=False) if name in parameters else value
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        where = module._parameters if name in parameters else module._buffers
        shapes = made[stored_name, place].shape, where[last].shape
        if shapes[0] != shapes[1]:
            raise FailedPrecondition(
                f"{name} is of shape {list(shapes[0])} in the weights file, and of {list(shapes[1])} in the model", field="files"
            )
        where[last] = made[stored_name, place]


def _dispatched(model: Any, device_map: Mapping[str, int | str], later: _Later) -> Any:
    """The model with accelerate's hooks, which move activations between devices and fetch what is not held.

    accelerate's own way to `disk` writes a copy of the weights into a folder. Here its loader is given the weights file itself, so that
    there is nothing to write, and nothing to clean up when a rank is killed.
    """
    main: int | str = next((device for device in device_map.values() if isinstance(device, int)), "cpu")
    if main != "cpu":
        state = model.state_dict()
        later.hold({name: value for name, value in state.items() if _place_of(name, device_map) == "cpu"})
    return accelerate.dispatch_model(
        model,
        dict(device_map),
        main_device=main,
        state_dict=later,
        offload_index={},
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )


def placed_engine(directory: ModelDirectory, device: str) -> PlacedEngine:
    """An engine for `directory`, which asks for `settings.placement`. `device`: where it takes its inputs; `cpu` leaves GPUs alone."""
    return PlacedEngine(directory, device)
