"""Tensors as they go from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensorway.errors import ModelFailed
from tensorway.model import Value
from tensorway_worker.rank.executor import Work


def sendable(name: str, value: Value) -> torch.Tensor:
    """`value` itself. Raises ModelFailed, naming it, where it is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise ModelFailed(f"{name} is BYTES, which cannot be sent to other ranks; turn it into tensors in preprocess")
    return value


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in a storage of their own: RPC sends the whole storage of a view that is more than half of it."""
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
    return tensor


def after_arrival(tensors: Sequence[torch.Tensor], work: Work) -> Work:
    """`work` for the torch thread, on tensors that a thread of RPC was given.

    On CUDA they are being written on that thread's streams, which the torch thread's stream must wait for.
    """
    on_device = [tensor for tensor in tensors if tensor.is_cuda]
    if not on_device:
        return work
    device = on_device[0].device
    event = torch.cuda.current_stream(device).record_event()

    def wait_then_work() -> None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        for tensor in on_device:
            # The allocator must not hand the memory on while this stream still reads it.
            tensor.record_stream(stream)
        work()

    return wait_then_work


def arrived(tensors: Sequence[torch.Tensor]) -> None:
    """Returns once tensors that a thread of RPC was given are whole: an outcome is read by threads that know nothing of streams."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
