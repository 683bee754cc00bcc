"""`tensorway models`: what the mesh serves, and bringing the files of model directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from tensorway.results import ModelDescription
    from tensorway.signature import TensorSpec

models_app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=False)

Endpoint = Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="The gateway.")]
_DEFAULT_ENDPOINT: Final = "localhost:8001"
_STYLES: Final = {"ready": "green", "loading": "yellow", "unavailable": "red"}


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, endpoint: Endpoint = _DEFAULT_ENDPOINT) -> None:
    """List the models of a mesh, show or scale one, show their load, or fetch the files of model directories. Without a command: list.

    Examples: `tensorway models` · `tensorway models show minilm` · `tensorway models scale minilm 2` · `tensorway models fetch models`
    """
    # `models --endpoint X list` means the same as `models list --endpoint X`.
    context.default_map = {command: {"endpoint": endpoint} for command in ("list", "show", "scale", "load")}
    if context.invoked_subcommand is None:
        list_models(endpoint)


@models_app.command("list")
def list_models(endpoint: Endpoint = _DEFAULT_ENDPOINT) -> None:
    """List all models with their state, replicas and signature."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tensorway.cli.connection import connect

    with connect(endpoint) as client:
        found = client.models()
    table = Table()
    for column in ("model", "revision", "state", "replicas", "inputs → outputs", "reason"):
        table.add_column(column, overflow="fold")
    for model in found:
        table.add_row(
            Text(model.name), f"{model.revision[:12]} ({model.version})", Text(model.state, style=_STYLES.get(model.state, "")),
            f"{model.num_ready_replicas}/{model.num_replicas}", Text(f"{_signature(model.inputs)}\n→ {_signature(model.outputs)}"),
            Text(model.reason),
        )
    console = Console()
    console.print(table if found else "The mesh serves no model. Start one: tensorway up MODELS_DIR")


@models_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")], endpoint: Endpoint = _DEFAULT_ENDPOINT
) -> None:
    """Show one model in full.

    Example: `tensorway models show minilm`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tensorway.cli.connection import connect

    with connect(endpoint) as client:
        model = client.model(name)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in _facts(model):
        table.add_row(label, Text(value))
    Console().print(table)


@models_app.command("scale")
def scale_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    replicas: Annotated[int, typer.Argument(min=0, help="How many replicas the mesh should run.")],
    endpoint: Endpoint = _DEFAULT_ENDPOINT,
) -> None:
    """Set how many replicas of a model are wanted. A model that scales by itself may change the number again.

    Example: `tensorway models scale minilm 2`
    """
    from rich.console import Console
    from rich.text import Text

    from tensorway.cli.connection import connect

    with connect(endpoint) as client:
        model = client.scale(name, replicas)
    are = f"{model.num_replicas} replica{'' if model.num_replicas == 1 else 's'}"
    Console().print(Text(f"{model.name}: {are} wanted, {model.num_ready_replicas} serving now"))


@models_app.command("load")
def show_load(
    name: Annotated[str, typer.Argument(help="Only this model.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C, once a second.")] = False,
    endpoint: Endpoint = _DEFAULT_ENDPOINT,
) -> None:
    """Show what each model has to do, and how many replicas that needs.

    Example: `tensorway models load --watch`
    """
    from rich.console import Console

    from tensorway.cli.connection import connect
    from tensorway.cli.load_table import load_table, watch_loads

    console = Console()
    with connect(endpoint) as client:
        if watch:
            watch_loads(client, name, console)
        else:
            console.print(load_table(client.load(name)))


@models_app.command("fetch")
def fetch(
    models_dir: Annotated[Path, typer.Argument(help="Directory that holds your model directories.")] = Path("models"),
    only: Annotated[list[str] | None, typer.Option("--model", help="Only this model; repeat for several.")] = None,
) -> None:
    """Bring every file that the model.yaml files declare, and check its SHA-256. What is there and right is left alone.

    Example: `tensorway models fetch models --model minilm`
    """
    from rich.console import Console

    from tensorway.cli.fetching import fetch_with_progress
    from tensorway.errors import NotFound
    from tensorway.model_directory import find_directories

    directories = find_directories(models_dir)
    known = {directory.yaml.name for directory in directories}
    for name in only or ():
        if name not in known:
            raise NotFound(f"{models_dir} has no model {name!r}; it has: {', '.join(sorted(known)) or 'none'}")
    chosen = [directory for directory in directories if not only or directory.yaml.name in only]
    console = Console()
    num_brought = fetch_with_progress(chosen, console)
    num_files = sum(len(directory.yaml.files) for directory in chosen)
    console.print(f"{num_files} files of {len(chosen)} models are there and right; {num_brought} were brought now.")


def _facts(model: ModelDescription) -> list[tuple[str, str]]:
    batching = f"up to {model.max_rows} rows in a step" if model.max_rows else "requests are never joined"
    return [
        ("model", model.name), ("description", model.description), ("revision", model.revision), ("version", model.version),
        ("engine", model.engine), ("state", f"{model.state}{': ' if model.reason else ''}{model.reason}"),
        ("replicas", f"{model.num_ready_replicas} of {model.num_replicas} serve"), ("batching", batching),
        *(("input", _tensor(spec)) for spec in model.inputs), *(("output", _tensor(spec)) for spec in model.outputs),
    ]


def _signature(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(map(_tensor, specs))


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype.name} [{', '.join(map(str, spec.shape))}]"
