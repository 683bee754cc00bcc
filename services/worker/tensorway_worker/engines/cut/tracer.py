"""What a model does, operation by operation, found out by running it once without its weights.

Parameters lie on the meta device: whatever depends on them has a shape but no content, and costs nothing. Everything else (masks, position
numbers, rotary tables: the glue, computed from a request's inputs alone) is computed for real, so that code which looks at its values takes
the branch that it takes in a step. Two of torch's own interception layers see all of it: `TorchDispatchMode` every operation,
`TorchFunctionMode` every look at a tensor's shape or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from tensorway.errors import FailedPrecondition
from tensorway.model import Inputs, Outputs
from tensorway_worker.engines.cut.trace import Call, Operation, Trace

META: Final = torch.device("meta")
CPU: Final = torch.device("cpu")
_aten = torch.ops.aten
#: Operations that take a tensor for its shape alone: what they return is glue, whatever they were given.
_SHAPE_ONLY: Final = {
    _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default, _aten.new_empty.default,
    _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten.empty_like.default,
}
_LOOKS_AT_VALUES: Final = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
#: torch gives a mode the getter behind a property; type checkers see the property's value instead.
_PROPERTIES: Final[Mapping[str, Any]] = vars(torch._C.TensorBase)
_SHAPE_READS: Final = {
    _PROPERTIES["shape"].__get__, _PROPERTIES["ndim"].__get__,
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__,
}
_DEVICE_READ: Final = _PROPERTIES["device"].__get__


def trace(root: torch.nn.Module, call: Callable[[Inputs], Outputs], inputs: Inputs) -> Trace:
    """Runs `call(inputs)` once, with `root`'s parameters on the meta device, and tells what it did.

    Args:
        root: the modules that `call` uses.
        inputs: tensors on the CPU, by name.

    Raises FailedPrecondition where the model cannot be followed: it looks at the values of activations, or works on something that is
    neither a tensor nor in one of `root`'s modules.
    """
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise FailedPrecondition(
                f"input {name} reaches forward as text: turn it into numbers in preprocess to cut this model", field=name
            )
    recorder = _Recorder(root, inputs)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_calls_recorded(root, recorder))
        stack.enter_context(_Looks(recorder))
        stack.enter_context(_Operations(recorder))
        try:
            outputs = call(dict(inputs))
        except (NotImplementedError, RuntimeError) as error:
            raise FailedPrecondition(
                f"{recorder.where()} cannot be followed without weights: {str(error).splitlines()[0]}", field="parallel"
            ) from error
    recorder.trace.outputs = outputs
    recorder.trace.root.end = len(recorder.trace.operations)
    return recorder.trace


class _Recorder:
    """What the interceptors share."""

    def __init__(self, root: torch.nn.Module, inputs: Inputs) -> None:
        self.trace = Trace(Call("", 0, None, 0))
        self.call = self.trace.root
        self.weights = {id(tensor): name for name, tensor in (*root.named_parameters(), *root.named_buffers())}
        self._num_calls: dict[str, int] = {}
        #: Glue tensors: id -> the inputs whose content they hold.
        self.content: dict[int, frozenset[str]] = {id(value): frozenset((name,)) for name, value in inputs.items()}
        self._storages = {value.untyped_storage()._cdata: name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        #: Memory of glue that activations were written into: from then on it is an activation.
        self.written: set[int] = set()
        #: Stand-ins on the meta device for glue.
        self.twins: dict[int, torch.Tensor] = {}
        self.is_embedding = {name for name, module in root.named_modules() if isinstance(module, torch.nn.Embedding)}

    def where(self) -> str:
        return f"module {self.call.name}" if self.call.name else "the model's forward"

    def enter(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        index = self._num_calls.get(name, 0)
        self._num_calls[name] = index + 1
        call = Call(name, index, self.call, len(self.trace.operations), args=args, kwargs=kwargs)
        self.call.children.append(call)
        self.call = call

    def leave(self, output: Any) -> None:
        call = self.call
        call.output, call.end = output, len(self.trace.operations)
        if call.parent is not None:
            self.call = call.parent

    def twin(self, value: Any) -> Any:
        """A glue tensor without its content, still known as that glue; anything else as it is."""
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return value
        with torch.utils._python_dispatch._disable_current_modes():
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self.twins[id(made)] = made
        self.content[id(made)] = self.content.get(id(value), frozenset())
        return made

    def is_activation(self, tensor: torch.Tensor) -> bool:
        if id(tensor) in self.twins:
            return False
        return tensor.is_meta or (bool(self.written) and tensor.untyped_storage()._cdata in self.written)

    def record(self, tensors: list[torch.Tensor], changed: list[torch.Tensor], made: list[torch.Tensor], flops: int) -> None:
        """One operation: what it read, what it wrote into, what it returned."""
        reads: list[int] = []
        weights: list[str] = []
        inputs: frozenset[str] = frozenset()
        for tensor in tensors:
            name = self.weights.get(id(tensor))
            if name is not None:
                weights.append(name)
            elif self.is_activation(tensor):
                reads.append(tensor.untyped_storage()._cdata if not tensor.is_meta else self._known(tensor))
            else:
                inputs |= self.content.get(id(tensor), frozenset())
        if changed and any(self.is_activation(tensor) for tensor in tensors):
            self.written.update(tensor.untyped_storage()._cdata for tensor in changed if not tensor.is_meta)
        for tensor in changed:
            if tensor.untyped_storage()._cdata in self._storages:
                self.trace.changed_inputs.add(self._storages[tensor.untyped_storage()._cdata])
        makes: list[int] = []
        for tensor in (*made, *changed):
            self.trace.keep(tensor)
            if self.is_activation(tensor):
                makes.append(id(tensor) if tensor.is_meta else tensor.untyped_storage()._cdata)
            else:
                self.content[id(tensor)] = inputs | self.content.get(id(tensor), frozenset())
        self.trace.operations.append(Operation(self.call, tuple(reads), tuple(makes), tuple(weights), inputs, flops))

    def _known(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self.trace.tensors:
            raise FailedPrecondition(
                f"{self.where()} uses a tensor of shape {list(tensor.shape)} that belongs to none of the model's modules: make it a "
                "parameter or a buffer of one",
                field="parallel",
            )
        return id(tensor)


class _Operations(TorchDispatchMode):
    """Runs every operation: with activations on the meta device, without on the CPU."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self._recorder
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in _SHAPE_ONLY:
            args = tree_map(_stand_in, args)
            tensors = []
        on_meta = any(map(recorder.is_activation, tensors))
        if func in _LOOKS_AT_VALUES:
            self._look_at_values(tensors, on_meta)
        if "device" in kwargs or not tensors:
            kwargs["device"] = META if on_meta else CPU
            if not any(argument.name == "device" for argument in func._schema.arguments):
                del kwargs["device"]
        changed = _changed(func, args, kwargs)
        if on_meta:
            args, kwargs = tree_map(_without_content, (args, kwargs))
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._note_embedding(func, tensors)
        recorder.record(tensors, changed, made, _flops(func, args, kwargs, result))
        # What was written in place is the caller's own tensor, not the copy without content.
        return changed[0] if changed and isinstance(result, torch.Tensor) and on_meta and not changed[0].is_meta else result

    def _look_at_values(self, tensors: list[torch.Tensor], on_meta: bool) -> None:
        if on_meta:
            raise FailedPrecondition(
                f"{self._recorder.where()} decides by the values of activations what to do next, which only a whole model can",
                field="parallel",
            )
        for tensor in tensors:
            self._recorder.trace.deciding_inputs.update(self._recorder.content.get(id(tensor), ()))

    def _note_embedding(self, func: Any, tensors: list[torch.Tensor]) -> None:
        if func is not _aten.embedding.default or self._recorder.call.name not in self._recorder.is_embedding:
            return
        for tensor in tensors:
            for name in self._recorder.content.get(id(tensor), ()):
                self._recorder.trace.embeddings.setdefault(name, self._recorder.call.name)


class _Looks(TorchFunctionMode):
    """Notes who looks at the shape of an activation, and hides that activations lie nowhere."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DEVICE_READ:
            return CPU
        if func in _SHAPE_READS and args[0].is_meta:
            self._recorder.trace.shape_reads.setdefault(id(args[0]), []).append(len(self._recorder.trace.operations))
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            # A few of torch's composite operations compare devices before any dispatch mode gets to see them.
            given = tree_leaves((args, kwargs or {}))
            if len({one.is_meta for one in given if isinstance(one, torch.Tensor)}) < 2:
                raise
            args, kwargs = tree_map(self._recorder.twin, (args, kwargs or {}))
            return func(*args, **kwargs)


@contextmanager
def _calls_recorded(root: torch.nn.Module, recorder: _Recorder) -> Iterator[None]:
    hooks: list[Any] = []
    try:
        for name, module in root.named_modules():
            if module is root or isinstance(module, torch.jit.ScriptModule):
                continue

            def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                recorder.enter(name, args, kwargs)

            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda _, __, output: recorder.leave(output)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among its arguments that `func` writes into."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def _stand_in(value: Any) -> Any:
    is_empty = isinstance(value, torch.Tensor) and value.is_meta
    return torch.zeros((), dtype=value.dtype).expand(value.shape) if is_empty else value


def _without_content(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) and not value.is_meta else value


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0
