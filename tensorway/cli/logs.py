"""`tensorway logs`: what the members of a mesh log, changed while they run."""

from __future__ import annotations

import re
from typing import Annotated, Final

import typer

from tensorway.errors import InvalidRequest

logs_app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, help="Change what the members of a mesh log while they run.")

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)?")
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNREACHED: Final = 1


@logs_app.callback()
def logs() -> None:
    """Change what the members of a mesh log while they run."""


@logs_app.command("level")
def level(
    to: Annotated[str, typer.Argument(metavar="LEVEL", help="debug, info, warning or error.")],
    members: Annotated[list[str] | None, typer.Option("--member", help="Only this member; repeat for several. Default: all.")] = None,
    for_: Annotated[str, typer.Option("--for", help="How long, e.g. 60s, 10m or 1h; default: until they start again.")] = "",
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="The gateway.")] = "localhost:8001",
) -> None:
    """Set the log level of gateways, orchestrators, nodes and groups. Status 1 where one could not be reached.

    Example: `tensorway logs level debug --for 60s`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tensorway.cli.connection import connect

    with connect(endpoint) as client:
        changes = client.set_log_level(to, members or (), seconds=_seconds(for_))
    table = Table()
    for column in ("member", "kind", "before", "now"):
        table.add_column(column, overflow="fold")
    for change in changes:
        now = Text(change.error, style="red") if change.error else Text(to)
        table.add_row(Text(change.id), change.kind, change.previous, now)
    Console().print(table)
    if any(change.error for change in changes):
        raise typer.Exit(_UNREACHED)


def _seconds(text: str) -> float:
    """`60s`, `10m`, `1h` or a number of seconds; 0 for nothing. Raises InvalidRequest."""
    if not text:
        return 0.0
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0.0:
        raise InvalidRequest(f"--for: {text!r} is no duration; write e.g. 60s, 10m or 1h", field="seconds")
    return float(found[1]) * _SECONDS[found[2] or ""]
