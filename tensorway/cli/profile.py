"""`tensorway profile`: a torch.profiler trace of a group that serves, all its ranks on one clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorway.errors import InternalError, InvalidRequest

if TYPE_CHECKING:
    from tensorway.client_operations import ProfileProgress


def profile(
    model: Annotated[str, typer.Argument(help="Name of the model; one of its live groups is profiled.")] = "",
    group: Annotated[str, typer.Option(help="Id of a group instead of a model.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps to record: batches, or decoding steps of a generating model.")] = 20,
    max_s: Annotated[float, typer.Option(min=0.1, max=600, help="Most seconds to wait for them; what there is by then is written.")] = 30.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the Chrome trace.")] = Path("trace.json.gz"),
    shapes: Annotated[bool, typer.Option("--shapes", help="Also the shapes of operators' inputs.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also what is allocated and freed.")] = False,
    stacks: Annotated[bool, typer.Option("--stacks", help="Also Python's call stacks: slow while it lasts.")] = False,
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="The gateway.")] = "localhost:8001",
) -> None:
    """Record the next steps of a live group with torch.profiler, on every rank, while it goes on serving.

    Example: `tensorway profile minilm --steps 20 -o minilm.json.gz`, and open the file at https://ui.perfetto.dev

    Send requests meanwhile: a group that has nothing to do runs no steps.
    """
    from tensorway.cli.connection import connect
    from tensorway.client_operations import ProfileWish

    if not model and not group:
        raise InvalidRequest("give the name of a model, or --group", field="model")
    wish = ProfileWish(model, group, steps, max_s, shapes, memory, stacks)
    with connect(endpoint) as client, closing(client.profile(wish)) as replies:
        num_steps, num_bytes = _write(replies, output)
    print(f"{output}: {num_steps} steps, {num_bytes / 1e6:.2f} MB. Open it at https://ui.perfetto.dev or in chrome://tracing.")


def _write(replies: Iterator[ProfileProgress | bytes], output: Path) -> tuple[int, int]:
    """Writes the file; returns the steps in it and its length, bytes. A file that is not whole is not left behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TextColumn("steps"))
    partial = output.with_name(f".{output.name}.part")
    num_steps = num_bytes = 0
    try:
        with partial.open("wb") as file, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("beginning", total=None)
            for reply in replies:
                if isinstance(reply, bytes):
                    num_bytes += file.write(reply)
                else:
                    num_steps = reply.num_steps
                    progress.update(task, description=f"{reply.group}: {reply.state}", completed=num_steps, total=reply.num_wanted)
        if not num_bytes:
            raise InternalError("the profile ended without a file")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return num_steps, num_bytes
