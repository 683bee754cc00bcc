"""A rank's own weights: which it is to hold, and how only those come into memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from tensorway.errors import FailedPrecondition
from tensorway_worker.engines.cut.weights_source import Slice, WeightsSource

#: `read(names, part)`: a weight by any of its names (tied weights have several), or one slice of it, on the rank's device; None where it
#: is not to be had.
Read = Callable[[Sequence[str], "Slice | None"], "torch.Tensor | None"]
#: Where torch's own CPU allocator puts tensors.
ALIGNMENT_BYTES: Final = 64
#: Weight -> every name that stands for the same content, its own first.
Names = Mapping[str, tuple[str, ...]]


def tied_names(root: torch.nn.Module) -> Names:
    """Every parameter's and buffer's names."""
    places: dict[int, list[str]] = {}
    for name, tensor in _weights(root):
        places.setdefault(id(tensor), []).append(name)
    return {name: (name, *(other for other in same if other != name)) for same in places.values() for name in same}


def untie(root: torch.nn.Module) -> Names:
    """Gives each place of a tied parameter one of its own, on the meta device, so that a rank may hold one without the other.

    Returns the names as they were before.
    """
    names = tied_names(root)
    seen: set[int] = set()
    for name, tensor in list(_weights(root)):
        if id(tensor) in seen and isinstance(tensor, torch.nn.Parameter):
            where, last = _place(root, name)
            where[last] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
        seen.add(id(tensor))
    return names


def fill(root: torch.nn.Module, own: Collection[str], names: Names, slices: Mapping[str, Slice], read: Read, device: str) -> None:
    """Reads the weights `own` into `root`, puts all other persistent buffers onto the meta device and the rest of them onto `device`.

    A weight that stands at several places with the same slice is read once. Raises FailedPrecondition naming a weight that cannot be had.
    """
    shared: dict[object, torch.Tensor] = {}
    persistent = set(root.state_dict(keep_vars=True))
    with torch.inference_mode(False), torch.no_grad():
        for name in [name for name, _ in _weights(root)]:
            where, last = _place(root, name)
            same = names.get(name, (name,))
            key = (min(same), slices.get(name))
            if name not in persistent:
                where[last] = where[last].to(device)
            elif name not in own:
                where[last] = _empty(where[last])
            elif key in shared:
                where[last] = shared[key]
            else:
                shared[key] = where[last] = _read(where, last, same, slices.get(name), read, device)


def _read(
    where: dict[str, Any], last: str, same: Sequence[str], part: Slice | None, read: Read, device: str
) -> torch.Tensor:
    """The weight that is to stand at `where[last]`; what stands there is let go of first."""
    before: torch.Tensor = where[last]
    is_parameter, shape = isinstance(before, torch.nn.Parameter), before.shape
    if is_parameter:
        where[last] = before = _empty(before)
    found = read(same, part)
    if found is None:
        if is_parameter or before.is_meta:
            raise FailedPrecondition(
                f"no weights file holds {same[0]}: name the right file in model.yaml, or have model.py's load read it with "
                "context.load_into",
                field="files",
            )
        # A buffer that no weights file holds keeps what the model's own code put there.
        return before.to(device)
    if found.shape != shape:
        raise FailedPrecondition(
            f"{same[0]} is of shape {list(found.shape)} in the weights file, and of {list(shape)} in the model", field="files"
        )
    found = found.clone() if is_askew(found) else found
    return torch.nn.Parameter(found, requires_grad=False) if is_parameter else found


def reader(source: WeightsSource, dtype: torch.dtype | None, device: str) -> Read:
    """Reads from a weights file."""
    there = source.names()

    def read(names: Sequence[str], part: Slice | None) -> torch.Tensor | None:
        found = next((name for name in names if name in there), None)
        return None if found is None else source.load(found, part, dtype, device)

    return read


def kept_of(state: Mapping[str, torch.Tensor], device: str) -> Read:
    """Takes weights from a whole model's `state`, copying what it takes, so that the rest can be freed."""

    def read(names: Sequence[str], part: Slice | None) -> torch.Tensor:
        found = state[next(name for name in names if name in state)].detach()
        taken = found if part is None else found[part.index()]
        return taken.to(device, copy=True, memory_format=torch.contiguous_format)

    return read


def align(root: torch.nn.Module) -> None:
    """Moves weights that lie askew in CPU memory (as parts of a mapped file do) to where torch's allocator puts tensors.

    Matrix libraries take another path for those, slower and with another order of sums: the same weights would give other bits.
    """
    with torch.no_grad():
        for _, tensor in _weights(root):
            if is_askew(tensor):
                tensor.data = tensor.data.clone()


def is_askew(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in CPU memory where torch's allocator would not put it."""
    return tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT_BYTES != 0


def held_bytes(root: torch.nn.Module) -> int:
    """Bytes of the weights that lie in memory; what is shared counts once."""
    held = {id(tensor): tensor.nbytes for _, tensor in _weights(root) if not tensor.is_meta}
    return sum(held.values())


def _weights(root: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def _place(root: torch.nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter or buffer, and its key there."""
    parent, _, last = name.rpartition(".")
    module = root.get_submodule(parent)
    return (module._parameters if last in module._parameters else module._buffers), last


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    on_meta = tensor.to("meta")
    return torch.nn.Parameter(on_meta, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else on_meta
