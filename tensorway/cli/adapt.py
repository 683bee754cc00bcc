"""`tensorway adapt`: training of a copy of a model on examples of yours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tensorway.errors import InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from tensorway.tensors import Tensor
    from tensorway.v1 import node_pb2

_ADAPT_MODEL: Final = "/tensorway.v1.NodeService/AdaptModel"
_INPUTS: Final = "inputs."
_TARGETS: Final = "targets."
#: As other programs end on Ctrl-C.
_EXIT_INTERRUPTED: Final = 130


def adapt(
    model: Annotated[str, typer.Argument(help="Name of the model, as its node offers it.")],
    data: Annotated[Path, typer.Option(help="safetensors file of the examples: `inputs.NAME` and `targets.NAME`, dimension 0 = rows.")],
    loss: Annotated[str, typer.Option(help="cross_entropy, mse or cosine.")] = "mse",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "adamw",
    batch_rows: Annotated[int, typer.Option(min=0, help="Rows of one step; 0: the model's batching.max_rows.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of the examples.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Train only parameters of such names, e.g. 'encoder.layer.5.*'; repeat.")] = None,
    lines: Annotated[list[str] | None, typer.Option(help="NAME=FILE: a BYTES input, one row a line of a text file; repeat.")] = None,
    new_model: Annotated[str, typer.Option(help="Name of the new model; default: the same.")] = "",
    revision: Annotated[str, typer.Option(help="Revision, or a prefix of it; default: the one that the node offers.")] = "",
    node: Annotated[str, typer.Option(envvar="TENSORWAY_NODE", help="The node's gRPC endpoint; default: the registry's only one.")] = "",
    registry: Annotated[str, typer.Option(envvar="TENSORWAY_REGISTRY", help="Where to look for a node; default: this machine's.")] = "",
) -> None:
    """Train a copy of a model and write it as a new model directory. What serves now is not touched.

    Make the data file:  `safetensors.torch.save_file({"inputs.x": x, "targets.y": y}, "data.safetensors")` (in Python)

    Train:               `tensorway adapt my-model --data data.safetensors --loss mse --steps 200 --learning-rate 1e-3`

    A text model:        `tensorway adapt minilm --lines text=sentences.txt --data targets.safetensors --loss cosine`

    Only its last layer: `tensorway adapt my-model --data data.safetensors --only 'head.*'`

    Serve the outcome:   `tensorway up adapted`

    The node must allow it: start it with `--allow-adaptation=true`, or the mesh with `TENSORWAY_ALLOW_ADAPTATION=true tensorway up models`.
    Ctrl-C ends the training and leaves nothing behind.
    """
    from rich.console import Console

    request = _request(read_examples(data, lines or ()), loss, optimizer)
    request.model, request.revision, request.new_model, request.num_steps = model, revision, new_model, steps
    request.learning_rate, request.batch_rows, request.seed = learning_rate, batch_rows, seed
    request.only.extend(only or ())
    console = Console()
    try:
        adapted = asyncio.run(_adapt(request, node, registry, console))
    except KeyboardInterrupt:
        console.print("Cancelled: the training has ended and nothing was written.")
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    console.print(f"{adapted.model} · revision {adapted.revision[:12]} · {adapted.num_parameters:,} numbers trained", highlight=False)
    console.print(f"{adapted.path}", highlight=False, soft_wrap=True)
    console.print(f"Serve it: tensorway up {Path(adapted.path).parent}", highlight=False, soft_wrap=True)


def read_examples(data: Path, lines: Iterable[str]) -> Mapping[str, Tensor]:
    """The tensors of a data file and of `--lines`, named `inputs.NAME` or `targets.NAME`. Raises InvalidRequest."""
    from tensorway.safetensors_file import read_safetensors

    found = read_safetensors(data)
    wrong = sorted(name for name in found if not name.startswith((_INPUTS, _TARGETS)))
    if wrong:
        raise InvalidRequest(f"{data}: tensors must be named inputs.NAME or targets.NAME, not {wrong[0]!r}", field="data")
    for item in lines:
        name, separator, path = item.partition("=")
        if not separator or f"{_INPUTS}{name}" in found:
            raise InvalidRequest(f"--lines {item!r}: write NAME=FILE, each input once", field="lines")
        found[f"{_INPUTS}{name}"] = _lines(f"{_INPUTS}{name}", Path(path))
    for prefix in (_INPUTS, _TARGETS):
        if not any(name.startswith(prefix) for name in found):
            raise InvalidRequest(f"{data}: there is no tensor named {prefix}NAME; `tensorway adapt --help` shows how", field="data")
    return found


def _lines(name: str, path: Path) -> Tensor:
    from tensorway.tensors import DataType, Tensor, encode_bytes

    try:
        rows = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidRequest(f"--lines: {path} cannot be read: {error.strerror}", field="lines") from error
    return Tensor(name, DataType.BYTES, (len(rows),), encode_bytes(rows))


def _request(examples: Mapping[str, Tensor], loss: str, optimizer: str) -> node_pb2.AdaptModelRequest:
    from tensorway.v1 import node_pb2, tensor_pb2

    request = node_pb2.AdaptModelRequest()
    for kind, words, word in (("loss", node_pb2.Loss, loss), ("optimizer", node_pb2.Optimizer, optimizer)):
        known = [name.lower().removeprefix(f"{kind}_") for name, number in words.items() if number]
        if word.lower() not in known:
            raise InvalidRequest(f"--{kind} {word!r}: must be one of {', '.join(known)}", field=kind)
        setattr(request, kind, words.Value(f"{kind}_{word}".upper()))
    for prefix, field in ((_INPUTS, request.inputs), (_TARGETS, request.targets)):
        for name, tensor in examples.items():
            if name.startswith(prefix):
                described = {"name": name.removeprefix(prefix), "dtype": int(tensor.dtype), "shape": tensor.shape}
                field.append(tensor_pb2.Tensor(**described, data=bytes(tensor.data)))  # type: ignore[arg-type]
    return request


async def _adapt(request: node_pb2.AdaptModelRequest, node: str, registry: str, console: Console) -> node_pb2.AdaptedModel:
    """The whole call, with a display of its progress."""
    from tensorway.cli.connection import given
    from tensorway.registry.port import NODE
    from tensorway.transport import AsyncChannel
    from tensorway.v1 import node_pb2

    channel = AsyncChannel(node or await _only_node(registry), tls=given().member_tls(NODE))
    stream = channel.server_stream(_ADAPT_MODEL, request.SerializeToString(), None)
    try:
        with _display(console, request.num_steps) as (progress, task):
            while (message := await stream.read()) is not None:
                news = node_pb2.AdaptModelResponse.FromString(message)
                if news.state == node_pb2.ADAPTATION_STATE_DONE:
                    return news.adapted
                loss = f"loss {news.loss:.6g}" if news.step else ""
                progress.update(task, completed=news.step, loss=loss)
                if news.detail:
                    progress.update(task, description=news.detail)
        raise Unavailable(f"{channel.endpoint} ended the call without a model")
    finally:
        await stream.cancel()
        await channel.close()


@contextmanager
def _display(console: Console, num_steps: int) -> Iterator[tuple[Progress, TaskID]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    words, loss = TextColumn("{task.description}"), TextColumn("{task.fields[loss]}")
    with Progress(words, BarColumn(30), MofNCompleteColumn(), loss, TimeRemainingColumn(), console=console) as progress:
        yield progress, progress.add_task("starting", total=num_steps, loss="")


async def _only_node(registry: str) -> str:
    """The endpoint of the registry's only node."""
    from tensorway.config import default_registry
    from tensorway.registry import open_registry
    from tensorway.registry.port import NODE

    url = registry or default_registry()
    found = open_registry(url)
    try:
        nodes = await found.registrations(NODE)
    finally:
        await found.close()
    if not nodes:
        raise NotFound(f"{url} knows no node; start a mesh with `tensorway up`, or name one with --node HOST:PORT", field="node")
    if len(nodes) > 1:
        listed = ", ".join(f"{one.id} at {one.endpoint}" for one in nodes)
        raise InvalidRequest(f"there are several nodes; choose one with --node: {listed}", field="node")
    return nodes[0].endpoint
