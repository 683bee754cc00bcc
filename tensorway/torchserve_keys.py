"""TorchServe's model-config keys in a model.yaml, translated into Tensorway's before validation. Pure.

A model-config.yaml can be pasted into a model.yaml as it is: what has a counterpart here becomes it, what asks for nothing (a switch
that is off, a timeout of 0) is dropped, and what would change the model's behaviour but has no counterpart is refused with what to do
instead. Key names and their meaning: TorchServe 0.12, docs/configuration.md and docs/large_model_inference.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from tensorway.errors import FailedPrecondition

#: TorchServe's key -> where its value goes.
_RENAMED: Final[Mapping[str, tuple[str, ...]]] = {
    "startupTimeout": ("startup_timeout_s",),
    "responseTimeout": ("default_timeout_s",),
    "batchSize": ("batching", "max_rows"),
    "maxBatchDelay": ("batching", "max_delay_ms"),
    "jobQueueSize": ("batching", "max_queue_rows"),
}
_DEVICES: Final = {"cpu": "cpu", "gpu": "cuda"}
_REFUSED: Final[Mapping[str, str]] = {
    "deviceIds": "a node assigns its own devices, the least used first; leave it out",
    "continuousBatching": "batches are joined work-conservingly as they are; leave it out",
    "sequenceBatching": "requests are independent here; declare the state as an input and an output, see docs/models.md",
    "useJobTicket": "set batching.max_queue_rows to refuse what would wait",
    "asyncCommunication": "there is nothing to switch on; leave it out",
    "useVenv": "install what the model needs into the node's own environment, and leave it out",
    "maxRetryTimeoutInSec": "a node forms a failed group anew for ever, with back-off; leave it out",
    "clientTimeoutInMills": "a client's own deadline is honoured; leave it out, or set default_timeout_s",
    "sequenceMaxIdleMSec": "requests are independent here; leave it out",
    "sequenceTimeoutMSec": "requests are independent here; leave it out",
    "maxNumSequence": "requests are independent here; leave it out",
    "maxSequenceJobQueueSize": "requests are independent here; leave it out",
    "deepspeed": "use `parallel: {tensor: N}`, or `parallel: {custom: N}` with an engine that starts DeepSpeed itself",
    "tnx": "AWS Neuron is not supported",
    "pt2": "compile inside the model's own load, or serve a torch.export program with `engine: export`",
    "micro_batching": "use `parallel: {micro_batches: N}`",
}
_PARALLEL_KEYS: Final = ("parallelType", "parallelLevel", "torchrun", "pippy")
#: Keys of the `torchrun` section that say where ranks meet, or how torchrun watches them.
_MEETING_KEYS: Final = ("rdzv-backend", "rdzv-endpoint", "rdzv-conf", "rdzv-id", "monitor-interval", "node-rank", "max-restarts")
_OWN_PARALLEL: Final = ("pipeline", "tensor", "custom")

Document = dict[str, Any]


def translated(document: Mapping[str, Any]) -> Document:
    """`document` in Tensorway's keys; one without any key of TorchServe's comes back equal.

    Raises FailedPrecondition that names a key of TorchServe's which has no counterpart, or contradicts another.
    """
    result: Document = {**document}
    for key, path in _RENAMED.items():
        # 0 leaves it to TorchServe, and so it does here.
        if (value := result.pop(key, None)) and _number(key, value):
            _place(result, path, value, key)
    for key, advice in _REFUSED.items():
        if result.pop(key, None):
            raise FailedPrecondition(f"{key}: {advice}", field=key)
    _take_device(result)
    _take_workers(result)
    if any(key in result for key in _PARALLEL_KEYS):
        _take_parallel(result)
    handler = result.pop("handler", None)
    if handler is not None:
        _place(result, ("settings", "handler"), handler, "handler")
    return result


def _take_device(result: Document) -> None:
    kind = result.pop("deviceType", None)
    if kind is not None:
        if str(kind) not in _DEVICES:
            raise FailedPrecondition(f"deviceType: must be cpu or gpu, got {kind!r}", field="deviceType")
        _place(result, ("device",), _DEVICES[str(kind)], "deviceType")


def _take_workers(result: Document) -> None:
    """TorchServe starts `minWorkers` workers of a model and lets a person scale up to `maxWorkers`."""
    least, most = result.pop("minWorkers", None), result.pop("maxWorkers", None)
    wanted = most if least is None else least
    if wanted is None:
        return
    if least is not None and most is not None and _number("maxWorkers", most) < _number("minWorkers", least):
        raise FailedPrecondition(f"maxWorkers: {most} is less than minWorkers={least}", field="maxWorkers")
    _place(result, ("replicas",), _number("minWorkers" if least is not None else "maxWorkers", wanted), "minWorkers")


def _take_parallel(result: Document) -> None:
    kind, level = result.pop("parallelType", None), result.pop("parallelLevel", None)
    torchrun, pippy = _section(result, "torchrun"), _section(result, "pippy")
    _take_pippy(result, pippy)
    nodes = _number("torchrun.nnodes", torchrun.pop("nnodes", 1))
    per_node = torchrun.pop("nproc-per-node", None)
    if "OMP_NUMBER_THREADS" in torchrun:
        _place(result, ("threads",), _number("torchrun.OMP_NUMBER_THREADS", torchrun.pop("OMP_NUMBER_THREADS")), "torchrun")
    for key in torchrun:
        advice = "ranks meet through their node, which watches them; leave it out" if key in _MEETING_KEYS else "is no key of TorchServe's"
        raise FailedPrecondition(f"torchrun.{key}: {advice}", field=f"torchrun.{key}")
    own: Document = _mapping("parallel", result.get("parallel"))
    if kind is None:
        if per_node is None and level is None and nodes == 1:
            return
        raise FailedPrecondition("parallelType: is missing, and torchrun or parallelLevel mean nothing without it", field="parallelType")
    size = _group_size(per_node, level, nodes)
    sizes = _SIZES.get(str(kind))
    if sizes is None:
        raise FailedPrecondition(f"parallelType: must be pp, tp, pptp or custom, got {kind!r}", field="parallelType")
    if kind != "pptp" and any(key in own for key in _OWN_PARALLEL):
        raise FailedPrecondition(f"parallelType: {kind} and `parallel` say the same thing; keep one of them", field="parallelType")
    found = sizes(size, own, result)
    result["parallel"] = {**own, **found, **({"nodes": nodes} if nodes > 1 else {})}


def _take_pippy(result: Document, pippy: Document) -> None:
    """PiPPy's `chunks` are our micro-batches; what else stands there described how PiPPy was to trace the model, which is not done here."""
    chunks = pippy.pop("chunks", None)
    if chunks is not None:
        _place(result, ("parallel", "micro_batches"), _number("pippy.chunks", chunks), "pippy.chunks")
    for key in pippy:
        if key not in ("input_names", "model_type", "rpc_timeout", "num_worker_threads"):
            raise FailedPrecondition(f"pippy.{key}: is no key of TorchServe's", field=f"pippy.{key}")


def _group_size(per_node: Any, level: Any, nodes: int) -> int:
    """Ranks (or devices) of a group, by whichever of the two keys says it."""
    if per_node is None and level is None:
        raise FailedPrecondition("torchrun.nproc-per-node: is missing: it says how many ranks a group has", field="torchrun.nproc-per-node")
    size = nodes * _number("torchrun.nproc-per-node", per_node) if per_node is not None else _number("parallelLevel", level)
    if level is not None and _number("parallelLevel", level) != size:
        raise FailedPrecondition(
            f"parallelLevel: is {level} where torchrun starts {size} ranks; make them equal or leave parallelLevel out",
            field="parallelLevel",
        )
    return size


def _both_sizes(size: int, own: Document, result: Document) -> Document:
    """pptp: TorchServe leaves it to the handler how its ranks are arranged, so somebody has to say it."""
    handler = result.get("handler")
    given = handler if isinstance(handler, Mapping) else {}
    pipeline, tensor = own.get("pipeline", given.get("pipeline")), own.get("tensor", given.get("tensor"))
    if pipeline is None or tensor is None:
        raise FailedPrecondition(
            f"parallelType: pptp does not say how {size} ranks are arranged; add `parallel: {{pipeline: P, tensor: T}}` with "
            f"P x T = {size} (or pipeline and tensor under handler)", field="parallelType",
        )
    if _number("pipeline", pipeline) * _number("tensor", tensor) != size:
        raise FailedPrecondition(f"parallelType: pipeline {pipeline} x tensor {tensor} is not {size} ranks", field="parallelType")
    return {"pipeline": pipeline, "tensor": tensor}


_SIZES: Final[Mapping[str, Callable[[int, Document, Document], Document]]] = {
    "pp": lambda size, _, __: {"pipeline": size},
    "tp": lambda size, _, __: {"tensor": size},
    "custom": lambda size, _, __: {"custom": size},
    "pptp": _both_sizes,
}


def _section(result: Document, key: str) -> Document:
    return _mapping(key, result.pop(key, None))


def _mapping(key: str, value: Any) -> Document:
    """A copy of a section; an empty one where it is not there."""
    if value is not None and not isinstance(value, Mapping):
        raise FailedPrecondition(f"{key}: must be a mapping", field=key)
    return dict(value or {})


def _number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FailedPrecondition(f"{key}: must be a whole number, not {value!r}", field=key)
    return value


def _place(result: Document, path: tuple[str, ...], value: Any, key: str) -> None:
    """Puts `value` where `path` says, unless Tensorway's own key is there already."""
    *parents, last = path
    place = result
    for parent in parents:
        # A copy: the caller's document stays as it is.
        inner = _mapping(parent, place.get(parent))
        place[parent] = inner
        place = inner
    if last in place:
        raise FailedPrecondition(f"{key}: says the same as {'.'.join(path)}; keep one of them", field=key)
    place[last] = value
