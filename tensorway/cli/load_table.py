"""The table of `tensorway models load`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tensorway.client import Client
from tensorway.load_report import LoadReport

_EVERY_S: Final = 1.0
_COLUMNS: Final = ("model", "rows/s", "queue ms", "waiting", "open", "utilisation", "replicas", "needed", "bounds")


def load_table(reports: Iterable[LoadReport]) -> Table:
    """One line for each model."""
    table = Table()
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for report in reports:
        table.add_row(
            Text(report.model), f"{report.arrival_rows_per_s:.1f}", f"{report.queue_s * 1e3:.1f}", str(report.waiting_rows),
            str(report.num_open), f"{report.utilisation:.0%}", f"{report.num_ready_replicas}/{report.num_wanted_replicas}",
            f"{report.predicted_replicas:.2f}", f"{report.min_replicas} to {report.max_replicas}" if report.scales else "by hand",
        )
    return table


def watch_loads(client: Client, model: str, console: Console) -> None:
    """Shows the table until Ctrl-C, which ends the command."""
    pause = threading.Event()
    with Live(load_table(client.load(model)), console=console, auto_refresh=False) as live:
        try:
            while not pause.wait(_EVERY_S):
                live.update(load_table(client.load(model)), refresh=True)
        except KeyboardInterrupt:
            return
