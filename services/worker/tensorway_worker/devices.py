"""The devices of this machine, found without torch, and who has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorway.errors import Overloaded
from tensorway.model_directory import ModelYaml
from tensorway_worker.topology import assign_devices


def cuda_devices() -> tuple[str, ...]:
    """`cuda:N` for every NVIDIA device node of this machine, in order."""
    numbers = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(f"cuda:{number}" for number in numbers)


class DevicePool:
    """Hands out this node's devices, the least used first. A device may be shared: memory, not a count, is what limits ranks."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self._in_use: list[str] = []

    def acquire(self, model: ModelYaml, num_ranks: int) -> tuple[tuple[str, ...], ...]:
        """The devices of each of `num_ranks` ranks of `model`; give them back with `release`.

        Raises Overloaded where a `custom` group wants more devices than there are.
        """
        available = () if model.device == "cpu" else self.devices
        wanted = model.parallel.custom
        acquired: tuple[tuple[str, ...], ...]
        if wanted and available:
            if wanted > len(available):
                raise Overloaded(f"parallel.custom wants {wanted} CUDA devices and this node has {len(available)}", field="parallel.custom")
            acquired = (assign_devices(available, wanted, self._in_use),)
        else:
            acquired = tuple((device,) for device in assign_devices(available, num_ranks, self._in_use))
        self._in_use.extend(device for own in acquired for device in own)
        return acquired

    def release(self, acquired: Sequence[tuple[str, ...]]) -> None:
        """Gives back what `acquire` returned."""
        for own in acquired:
            for device in own:
                self._in_use.remove(device)
