"""`tensorway infer`: one request from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorway.errors import InvalidRequest
from tensorway.signature import TensorSpec
from tensorway.tensors import DataType, Tensor


def infer(
    model: Annotated[str, typer.Argument(help="Name of the model; `tensorway models` lists them.")],
    text: Annotated[list[str] | None, typer.Option(help="One row for the model's only BYTES input; repeat for several rows.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=JSON, NAME=@file.npy, or for BYTES NAME=text or NAME=@any-file; repeat.")
    ] = None,
    outputs: Annotated[list[str] | None, typer.Option("--output", help="Only this output; repeat for several.")] = None,
    parameters: Annotated[list[str] | None, typer.Option("--parameter", help="NAME=VALUE for the model itself; repeat.")] = None,
    revision: Annotated[str, typer.Option(help="Revision, or a prefix of 8 or more digits; default: the one that serves.")] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="The gateway.")] = "localhost:8001",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline, seconds.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all values as JSON instead of a table.")] = False,
) -> None:
    """Run one request and show what comes back.

    Sentences:  `tensorway infer minilm --text "a cat" --text "a dog"`

    A picture:  `tensorway infer efficientnet-lite0 --input image=@cat.jpg`

    Numbers:    `tensorway infer identity --input 'input=[[1, 2, 3]]'`

    An array:   `tensorway infer silero-vad --input audio=@audio.npy --output speech_probability`
    """
    from tensorway.cli.connection import connect

    with connect(endpoint, timeout_s=timeout_s) as client:
        description = client.model(model)
        tensors = read_inputs(description.inputs, inputs or (), text or ())
        result = client.infer(
            model, tensors, outputs=outputs or None, revision=revision, priority=priority, parameters=_read_parameters(parameters or ())
        )
    if as_json:
        from tensorway.arrays import to_nested

        print(json.dumps({tensor.name: to_nested(tensor) for tensor in result.tensors}))
        return
    _show(result.tensors, f"{result.model} · revision {result.revision[:12]} · request {result.request_id}", str(result.timing))
    for name, value in result.parameters.items():
        print(f"{name} = {value}")


def read_inputs(specs: Sequence[TensorSpec], given: Iterable[str], texts: Sequence[str]) -> Mapping[str, Tensor]:
    """The tensors that `--input` and `--text` mean. Several values of one BYTES input are its rows. Raises InvalidRequest."""
    from tensorway.arrays import to_tensor

    by_name = {spec.name: spec for spec in specs}
    tensors: dict[str, Tensor] = {}
    rows: dict[str, list[bytes]] = {}
    for item in given:
        name, separator, value = item.partition("=")
        spec = by_name.get(name)
        if not separator or spec is None:
            raise InvalidRequest(f"--input {item!r}: write NAME=VALUE with a NAME of {', '.join(by_name)}", field=name)
        if name in tensors:
            raise InvalidRequest(f"--input {name} is given twice; only BYTES inputs take several rows", field=name)
        found = _read_value(spec, value)
        if isinstance(found, bytes):
            rows.setdefault(name, []).append(found)
        else:
            tensors[name] = found
    if texts:
        rows.setdefault(_text_input(specs), []).extend(text.encode() for text in texts)
    for name, elements in rows.items():
        # A scalar input takes one element, any other a list of rows.
        tensors[name] = to_tensor(name, elements)
    return tensors


def _read_value(spec: TensorSpec, value: str) -> Tensor | bytes:
    """A whole tensor, or one element of a BYTES input."""
    from tensorway.arrays import from_nested, load_npy

    if value.startswith("@"):
        path = Path(value[1:])
        if path.suffix == ".npy":
            return load_npy(spec.name, path)
        if spec.dtype is not DataType.BYTES:
            raise InvalidRequest(f"--input {spec.name}: {spec.dtype.name} is read from .npy files, not from {path}", field=spec.name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"--input {spec.name}: {path} cannot be read: {error}", field=spec.name) from error
    try:
        parsed: Any = json.loads(value)
    except ValueError as error:
        if spec.dtype is DataType.BYTES:
            return value.encode()
        raise InvalidRequest(f"--input {spec.name}: {value[:60]!r} is neither JSON nor @file: {error}", field=spec.name) from error
    if spec.dtype is DataType.BYTES and not isinstance(parsed, list):
        return value.encode()
    return from_nested(spec, parsed)


def _text_input(specs: Sequence[TensorSpec]) -> str:
    names = [spec.name for spec in specs if spec.dtype is DataType.BYTES]
    if len(names) != 1:
        known = ", ".join(spec.name for spec in specs)
        raise InvalidRequest(f"--text needs a model with exactly one BYTES input; this one has {len(names)}: use --input with {known}")
    return names[0]


def _read_parameters(given: Iterable[str]) -> dict[str, bool | int | float | str]:
    found: dict[str, bool | int | float | str] = {}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator:
            raise InvalidRequest(f"--parameter {item!r}: write NAME=VALUE", field=name)
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found[name] = parsed if isinstance(parsed, (bool, int, float, str)) else value
    return found


def _show(tensors: Iterable[Tensor], title: str, timing: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tensorway.arrays import preview

    table = Table()
    for column in ("output", "dtype", "shape", "values"):
        table.add_column(column)
    for tensor in tensors:
        table.add_row(Text(tensor.name), tensor.dtype.name, Text(str(list(tensor.shape))), Text(preview(tensor)))
    console = Console()
    console.print(Text(title), soft_wrap=True)
    console.print(table)
    console.print(Text(timing, style="dim"), soft_wrap=True)
