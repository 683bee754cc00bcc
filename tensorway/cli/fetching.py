"""Fetching model files with a progress display."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from tensorway.fetch import FetchProgress, fetch_files
from tensorway.model_directory import ModelDirectory


def fetch_with_progress(directories: Iterable[ModelDirectory], console: Console) -> int:
    """Brings every declared file of `directories`, and says what it does; returns how many files were brought. Raises what fetching
    raises, once the display is gone."""
    num_brought = 0
    columns = (TextColumn("{task.description}"), BarColumn(30), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        for directory in directories:
            tasks: dict[str, TaskID] = {}

            def show(step: FetchProgress, name: str = directory.yaml.name, tasks: dict[str, TaskID] = tasks) -> None:
                nonlocal num_brought
                task = tasks.get(step.path)
                if task is None:
                    task = tasks[step.path] = progress.add_task(f"{name}: {step.path}", total=None, state="")
                progress.update(task, completed=step.num_bytes, total=step.total_bytes or None, state=step.state)
                num_brought += step.state == "done"

            fetch_files(directory, show)
    return num_brought
