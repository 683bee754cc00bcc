"""`tensorway plan`: what cutting a model over several ranks would mean, without starting anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tensorway.errors import FailedPrecondition, NotFound

if TYPE_CHECKING:
    from rich.table import Table

_MIB: Final = 1 << 20


def plan(
    model: Annotated[str, typer.Argument(help="Name of a model in MODELS_DIR, or the path of a model directory.")],
    pipeline: Annotated[int, typer.Option(min=0, help="Pipeline stages; 0: what model.yaml says.")] = 0,
    tensor: Annotated[int, typer.Option(min=0, help="Tensor shards of each stage; 0: what model.yaml says.")] = 0,
    models_dir: Annotated[Path, typer.Option(help="Directory that holds your model directories.")] = Path("models"),
    rows: Annotated[int, typer.Option(min=0, help="Rows of a step; 0: model.yaml's batching.max_rows.")] = 0,
    device: Annotated[str, typer.Option(help="Where layers are measured: `cpu` or `cuda:N`.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Torch threads of a rank; 0: all cores.")] = 0,
    hop_us: Annotated[
        float, typer.Option(min=0, help="Time of one hop or one sum between ranks, microseconds; `make bench-groups` measures yours.")
    ] = 400.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show how a model would be cut over several ranks: what each holds, its memory, its time, and what cannot be cut and why.

    Nothing is started and no weights are loaded; each kind of layer is run alone for a moment, to know how long it takes here.

    Two stages:        `tensorway plan minilm --pipeline 2`

    Two shards:        `tensorway plan smollm2 --tensor 2 --rows 4`

    Both, four ranks:  `tensorway plan smollm2 --pipeline 2 --tensor 2 --threads 1`

    For a program:     `tensorway plan ./my-model --pipeline 4 --json`

    A plan you like goes into model.yaml: `parallel: {pipeline: 2, tensor: 1}`.
    """
    directory = _directory(model, models_dir)
    options = {"pipeline": pipeline, "tensor": tensor, "rows": rows, "device": device, "threads": threads, "hop-us": hop_us}
    found = _predicted(directory, [f"--{name}={value}" for name, value in options.items()])
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def _directory(model: str, models_dir: Path) -> Path:
    if "/" in model or (Path(model) / "model.yaml").is_file():
        return Path(model)
    from tensorway.model_directory import find_directories

    known = {directory.yaml.name: directory.path for directory in find_directories(models_dir)}
    if model not in known:
        raise NotFound(f"{models_dir} has no model {model!r}; it has: {', '.join(sorted(known)) or 'none'}")
    return known[model]


def _predicted(directory: Path, options: list[str]) -> dict[str, Any]:
    """What the worker's planning program says; torch is imported there, never here."""
    program = [sys.executable, "-m", "tensorway_worker.plan", str(directory), *options]
    ran = subprocess.run(program, capture_output=True, text=True, check=False)
    if ran.returncode == 0:
        found: dict[str, Any] = json.loads(ran.stdout)
        return found
    said = ran.stderr.strip().splitlines()
    if any("No module named" in line for line in said[-1:]):
        raise FailedPrecondition(f"planning needs a worker's libraries: pip install 'tensorway[worker]' ({said[-1]})")
    raise FailedPrecondition(said[-1] if said else f"the planning program ended with status {ran.returncode}")


def show(found: dict[str, Any]) -> None:
    """Prints a plan: a table of ranks, predicted times, and what stays in one piece."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(_ranks(found))
    whole = f"{found['whole_weights_bytes'] / _MIB:.0f} MiB of weights, {found['whole_time_s'] * 1e3:.1f} ms a step"
    inputs = ", ".join(f"{name} {shape}" for name, shape in found["inputs"].items())
    where = f"{found['device']}, {found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    console.print(Text(f"For {inputs} on {where}, one rank alone: {whole}."))
    for count, seconds in found["step_s"].items():
        pieces = "as one batch" if count == "1" else f"in {count} micro-batches"
        console.print(f"Cut, {pieces}: {seconds * 1e3:.1f} ms a step, {_ratio(found['whole_time_s'], seconds)}.", highlight=False)
    slowest = max((rank["time_s"] + rank["sums_s"] for rank in found["ranks"]), default=0.0)
    if found["pipeline"] > 1 and slowest:
        console.print(f"With batches in every stage: {found['rows'] / slowest:.0f} rows/s, one rank alone "
                      f"{found['rows'] / found['whole_time_s']:.0f}.", highlight=False)  # fmt: skip
    for line in (*found["not_cut"], *found["notes"]):
        console.print(Text(f"• {line}"))
    console.print(
        Text("Every rank is taken to have its device, or its threads' cores, for itself. Glue between layers is not counted.", style="dim")
    )


def _ranks(found: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{found['model']}: pipeline {found['pipeline']} x tensor {found['tensor']}", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("stage\nshard", justify="right")
    table.add_column("holds", overflow="fold")
    for column in ("weights\nMiB", "active\nMiB", "time\nms", "busy"):
        table.add_column(column, justify="right")
    for rank in found["ranks"]:
        modules = f"{rank['num_modules']} part{'s' if rank['num_modules'] != 1 else ''}"
        table.add_row(
            str(rank["rank"]), f"{rank['stage']}.{rank['shard']}", Text(f"{rank['holds']} ({modules})"),
            f"{rank['weights_bytes'] / _MIB:.1f}", f"{rank['activation_bytes'] / _MIB:.1f}",
            f"{(rank['time_s'] + rank['sums_s']) * 1e3:.1f}", f"{rank['busy_share']:.0%}",
        )
    return table


def _ratio(whole_s: float, cut_s: float) -> str:
    if cut_s <= 0 or whole_s <= 0:
        return "too fast to compare"
    return f"{whole_s / cut_s:.2f} times as fast" if cut_s <= whole_s else f"{cut_s / whole_s:.2f} times as long"
