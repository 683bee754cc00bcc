"""Writes the parts of the documentation that the code knows best. `python -m docs.generate` rewrites them, `--check` only looks.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; `PARTS` says what makes each of them.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.metric_table import metric_table
from tensorway.config import ServiceSettings, default_registry
from tensorway.errors import STATUS_OF, TensorwayError
from tensorway.model_directory import ModelYaml
from tensorway.process import MALLOC_SETTINGS
from tensorway.tensors import ITEM_SIZE, DataType
from tensorway.v1 import tensor_pb2
from tensorway_gateway.settings import GatewaySettings
from tensorway_orchestrator.settings import OrchestratorSettings
from tensorway_worker.settings import NodeSettings

DOCS: Final = Path(__file__).parent
_PART: Final = re.compile(r"(<!-- generated: (?P<name>[a-z ]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)

#: What model.yaml's keys mean. Its schema is checked against this: a key without a sentence, or a sentence without a key, is an error.
MODEL_KEYS: Final = {
    "name": "Name by which clients ask for it; unique in the mesh.",
    "description": "One sentence, shown by `tensorway models show`.",
    "version": "The author's own label; OIP clients may ask for it as `model_version`.",
    "engine": "Who runs it; see [Engines](#engines).",
    "inputs": "What a request brings, at least one.",
    "inputs[].name": "Unique among the inputs.",
    "inputs[].dtype": "A [data type](wire.md#data-types).",
    "inputs[].shape": "Fixed extents and names; see [Shapes](#shapes).",
    "outputs": "What an answer brings, at least one.",
    "outputs[].name": "Unique among the outputs.",
    "outputs[].dtype": "A [data type](wire.md#data-types). The model must return exactly this one.",
    "outputs[].shape": "As for inputs.",
    "batching": "How requests are joined; see [Batching and padding](#batching-and-padding).",
    "batching.max_rows": "Most rows in one step. The warm-up runs this size.",
    "batching.max_delay_ms": "The author's wish to wait for company, milliseconds; 0: none.",
    "batching.max_queue_rows": "Rows that may wait in one orchestrator before RESOURCE_EXHAUSTED.",
    "batching.oversize": "A request of more than `max_rows` rows: `refuse` it with INVALID_ARGUMENT, or run it `alone`.",
    "batching.padding": "Input name → value of the elements added to make lengths equal.",
    "generation": "Makes the model one that generates tokens; see [Generation](generation.md).",
    "generation.max_sequences": "Answers that a group makes at once; more wait in the orchestrator.",
    "generation.max_waiting": "Answers that may wait in one orchestrator before RESOURCE_EXHAUSTED.",
    "generation.max_context": "Tokens of a prompt and its answer together; 0: as many as the model was made for.",
    "generation.kv_cache_mb": "Memory of all keys and values, MiB, over all ranks of a group. An answer that finds no room waits.",
    "generation.block_tokens": "Tokens in one block of that memory; prefixes are shared by whole blocks.",
    "generation.step_tokens": "Most tokens in one step: one of each running answer, and pieces of new prompts.",
    "generation.defaults": "What a caller gets who does not say otherwise.",
    "generation.defaults.temperature": "0 takes the most likely token.",
    "generation.defaults.top_k": "Only the k most likely tokens; 0: all.",
    "generation.defaults.top_p": "Only the most likely tokens whose probabilities reach this sum.",
    "generation.defaults.min_p": "Only tokens at least this share as likely as the most likely one.",
    "generation.defaults.repetition_penalty": "Above 1: tokens that came before become less likely.",
    "generation.defaults.max_tokens": "Most tokens of an answer; 0: as many as the context holds.",
    "hedging": "Late requests are sent to a second group, too; see [Failures and load](resilience.md#hedging).",
    "hedging.quantile": "A request is late once it has taken longer than this share of recent ones.",
    "hedging.min_delay_ms": "However quick the others were, none is hedged before this, milliseconds.",
    "hedging.max_share": "Most hedges as a share of requests.",
    "fallback": "Who answers when this model cannot; see [Failures and load](resilience.md#fallback).",
    "fallback.model": "A model that takes and returns tensors of the same names and types.",
    "fallback.revision": "Its revision, or a unique prefix of at least 8 digits; empty: the one that serves.",
    "scaling": "The mesh chooses the number of replicas; see [Scaling](scaling.md).",
    "scaling.min_replicas": "0 lets the last replica end; the first request starts one again.",
    "scaling.max_replicas": "Most replicas.",
    "scaling.target_utilisation": "Share of the time that a replica should compute.",
    "scaling.idle_s": "Seconds of calm before a replica ends.",
    "files": "Files to fetch, kept under `files/`; see [Files](#files).",
    "files[].path": "Where it lies under `files/`; must stay inside.",
    "files[].source": "Where it comes from.",
    "files[].sha256": "SHA-256 of its content, 64 lower-case hex digits.",
    "parallel": "Ranks of one group; see [Groups of several ranks](#groups-of-several-ranks).",
    "parallel.pipeline": "Pipeline stages.",
    "parallel.tensor": "Tensor shards.",
    "parallel.nodes": "Nodes that the ranks are spread over, in equal consecutive blocks.",
    "parallel.micro_batches": "Micro-batches that a batch passes a pipeline as; 0: one per stage where each has rows enough.",
    "parallel.custom": "Devices that one rank manages by itself; excludes the other keys.",
    "parallel.verify": "Comparison with the uncut model at load. `auto`: until it has served once, where memory allows; `always`; `off`.",
    "replicas": "Groups wanted in the whole mesh; 0 offers the model without running it.",
    "threads": "Torch threads of a rank; 0 takes the node's `threads`, or the machine's cores divided by the ranks of the group.",
    "device": "`cpu` stays on the CPU; `auto` and `cuda` take a CUDA device where the node has one, the CPU elsewhere.",
    "weights_dtype": "Element type that floating-point weights are turned into; `keep` leaves them as stored.",
    "memory_limit_mb": "Most memory of a rank, MiB; 0: what the machine, its control group or the device has. A batch predicted to need "
    "more is split; a request that needs more alone is refused with RESOURCE_EXHAUSTED.",
    "startup_timeout_s": "Seconds that a group may take until it serves.",
    "default_timeout_s": "Deadline of a request that sets none, seconds.",
    "settings": "For the engine, or for your own `model.py` as `context.settings`.",
}


def service_settings(settings: type[ServiceSettings]) -> Iterator[str]:
    """A table of one service's settings: its own first, then those that it shares with the others."""
    shared = ServiceSettings.model_fields
    own = {name: field for name, field in settings.model_fields.items() if name not in shared}
    rest = {name: settings.model_fields[name] for name in shared}
    yield from ("| flag | default | meaning |", "| --- | --- | --- |")
    for name, field in {**own, **rest}.items():
        default = _default(name, field)
        bounds = _bounds(field.metadata)
        choices = f" One of {', '.join(_choices(field.annotation))}." if _choices(field.annotation) else ""
        within = f" ({bounds})" if bounds else ""
        yield f"| `--{name.replace('_', '-')}` | {default} | {field.description}{choices}{within} |"


def model_keys() -> Iterator[str]:
    """A table of every key of model.yaml. Raises ValueError where MODEL_KEYS and the schema name different keys."""
    found = dict(_walk(ModelYaml, ""))
    if found.keys() != MODEL_KEYS.keys():
        raise ValueError(f"MODEL_KEYS and tensorway.model_directory.ModelYaml differ in {sorted(found.keys() ^ MODEL_KEYS.keys())}")
    yield from ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
    for key, field in found.items():
        default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
        yield f"| `{key}` | {_type(field)} | {default} | {MODEL_KEYS[key]} |"


def errors() -> Iterator[str]:
    """A table of every error that can reach a client."""
    yield from ("| error | gRPC status | reason | another attempt may help | meaning |", "| --- | --- | --- | --- | --- |")
    for kind, (status, is_retryable) in STATUS_OF.items():
        if kind.reason == TensorwayError.reason:
            continue  # a branch of the tree, never raised itself
        meaning = " ".join((kind.__doc__ or "").split())
        yield f"| `{kind.__name__}` | {status.name} | `{kind.reason}` | {'yes' if is_retryable else 'no'} | {meaning} |"


def data_types() -> Iterator[str]:
    """A table of element types."""
    yield from ("| name | number | bytes an element |", "| --- | ---: | --- |")
    for dtype in DataType:
        assert tensor_pb2.DataType.Name(dtype.value) == f"DATA_TYPE_{dtype.name}"
        size = ITEM_SIZE.get(dtype)
        yield f"| {dtype.name} | {dtype.value} | {size if size is not None else '4 + its length'} |"


def malloc_settings() -> Iterator[str]:
    """A table of glibc's variables as services and ranks get them."""
    yield from ("| variable | value |", "| --- | ---: |")
    for name in MALLOC_SETTINGS:
        yield f"| `{name}` | {MALLOC_SETTINGS[name]} |"


#: Name of a part -> the lines that belong there.
PARTS: Final[dict[str, Callable[[], Iterable[str]]]] = {
    "gateway settings": lambda: service_settings(GatewaySettings),
    "orchestrator settings": lambda: service_settings(OrchestratorSettings),
    "node settings": lambda: service_settings(NodeSettings),
    "model keys": model_keys,
    "errors": errors,
    "data types": data_types,
    "metrics": metric_table,
    "malloc settings": malloc_settings,
}


def rendered(text: str) -> str:
    """`text` with every generated part as the code has it now. Raises KeyError for a part that nothing makes."""
    return _PART.sub(lambda found: f"{found[1]}{chr(10).join(PARTS[found['name']]())}\n{found[3]}", text)


def stale_files() -> dict[Path, str]:
    """Every page whose generated parts are out of date, and what it should be. Raises ValueError for a part that no page shows."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
    shown = {found["name"] for text in pages.values() for found in _PART.finditer(text)}
    if shown != PARTS.keys():
        raise ValueError(f"parts that no page shows, or that nothing makes: {sorted(shown ^ PARTS.keys())}")
    return {path: new for path, text in pages.items() if (new := rendered(text)) != text}


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        inner, is_list = _model_in(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model that a field holds, and whether it holds several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) is tuple:
        return _model_in(get_args(annotation)[0])[0], True
    if get_origin(annotation) is types.UnionType:
        return _model_in(get_args(annotation)[0])
    return None, False


def _type(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    if choices:
        return " \\| ".join(choices)
    bounds = _bounds(field.metadata)
    return _type_name(field.annotation) + (f" {bounds}" if bounds else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "any"
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not types.NoneType)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "string", int: "integer", float: "number", bool: "bool"}[annotation]


def _choices(annotation: Any) -> tuple[str, ...]:
    return tuple(f"`{choice}`" for choice in get_args(annotation)) if get_origin(annotation) is Literal else ()


def _bounds(metadata: Iterable[object]) -> str:
    words: list[str] = []
    for item in metadata:
        if isinstance(item, Ge):
            words.append(f"≥ {item.ge}")
        elif isinstance(item, Gt):
            words.append(f"> {item.gt}")
        elif isinstance(item, Le):
            words.append(f"≤ {item.le:g}" if isinstance(item.le, float) else f"≤ {item.le}")
        elif isinstance(item, Lt):
            words.append(f"< {item.lt}")
        elif isinstance(item, MinLen) and item.min_length > 1:
            words.append(f"at least {item.min_length}")
    return ", ".join(words)


def _default(name: str, field: FieldInfo) -> str:
    if field.default_factory is default_registry:
        return "`directory:` and your runtime directory, then `/tensorway`"
    if name == "models":
        return "all"
    assert field.default is not PydanticUndefined, name
    return _show(field.default)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if value in ("", (), {}):
        return "empty"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def main() -> int:
    """Rewrites the stale pages, or with `--check` names them; returns 1 where a check finds any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    is_check = parser.parse_args().check
    stale = stale_files()
    for path, text in stale.items():
        if is_check:
            print(f"{path.relative_to(DOCS.parent)} is stale; run `python -m docs.generate`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(DOCS.parent)} written")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    raise SystemExit(main())
