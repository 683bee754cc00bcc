"""How a frame of `tensorway top` looks on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensorway.cli.top_frame import Frame, GroupRow, MemberRow, ModelRow

_STATES: Final = {"ready": "green", "backing_off": "red", "failed": "red", "stopping": "bright_black"}
_UNKNOWN: Final = "-"
_NUM_ERRORS: Final = 4
#: Ranks of one group that a line has room for, on a wide and on a narrow terminal.
_NUM_RANKS: Final = (16, 8)
_WIDE: Final = 100


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the models' table. The one with the smallest `priority` is left out last where the terminal is narrow."""

    title: str
    priority: int
    width: int
    cell: Callable[[ModelRow], str | Text]
    #: The largest first; None: by name.
    order: Callable[[ModelRow], float] | None = None


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value / 2**30:.1f}G" if value >= 2**30 else f"{value / 2**20:.0f}M"


def _replicas(row: ModelRow) -> Text:
    style = "green" if row.num_ready >= row.num_wanted else "yellow" if row.num_ready else "red"
    return Text(f"{row.num_ready}/{row.num_wanted}", style=style if row.num_wanted else "bright_black")


def _failures(row: ModelRow) -> Text:
    return Text(_number(row.failures_per_s), style="red" if row.failures_per_s else "")


#: In the order of the table. Keys of the program choose among those that have an order.
COLUMNS: Final = (
    Column("model", 0, 14, lambda row: Text(row.name)),
    Column("ready", 1, 5, _replicas),
    Column("req/s", 1, 6, lambda row: _number(row.requests_per_s), lambda row: row.requests_per_s),
    Column("p50 ms", 3, 6, lambda row: _time(row.p50_s)),
    Column("p99 ms", 2, 6, lambda row: _time(row.p99_s), lambda row: row.p99_s or 0.0),
    Column("queue", 2, 5, lambda row: _number(row.queued_rows), lambda row: row.queued_rows),
    Column("batch", 4, 5, lambda row: _number(row.batch_rows)),
    Column("tok/s", 3, 6, lambda row: _number(row.tokens_per_s), lambda row: row.tokens_per_s or 0.0),
    Column("busy", 4, 5, lambda row: f"{row.utilisation:.0%}", lambda row: row.utilisation),
    Column("err/s", 2, 5, _failures, lambda row: row.failures_per_s),
)
#: What the models can be ordered by, the first at the start.
ORDERS: Final = (COLUMNS[0], *(column for column in COLUMNS if column.order is not None))


def screen(frame: Frame, console: Console, order: Column = COLUMNS[0], problem: str = "") -> RenderableType:
    """The whole frame, cut to the terminal's width and height. `problem`: why it is old."""
    height = console.height if console.is_terminal else 10_000
    models = models_table(frame.models, console.width, order)
    parts: list[RenderableType] = [_head(frame, order, problem), members_table(frame.members), models]
    used = 8 + len(frame.members) + len(frame.models) + (min(_NUM_ERRORS, len(frame.errors)) + 1 if frame.errors else 0)
    parts.append(groups_table(frame.groups, console.width, max(3, height - used)))
    if frame.errors:
        parts.append(_errors(frame, console.width))
    return Group(*parts)


def members_table(rows: Sequence[MemberRow]) -> Table:
    """Gateways, orchestrators and nodes."""
    table = _table()
    table.add_column("member", ratio=2, no_wrap=True, overflow="ellipsis")
    for title in ("state", "up", "cpu", "memory", "open"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        name = Text(row.id) + Text(f"  {row.kind}", style="bright_black")
        if row.is_ready is None:
            state = Text("?", style="yellow")
        else:
            state = Text("ready", style="green") if row.is_ready else Text("not ready", style="red")
        cpu = _UNKNOWN if row.cpu is None else f"{row.cpu:.0%}"
        table.add_row(name, state, _duration(row.uptime_s), cpu, _bytes(row.memory_bytes), _number(row.num_open))
    return table


def models_table(rows: Sequence[ModelRow], width: int, order: Column) -> Table:
    """One line for each model, with as many columns as there is room for."""
    shown = [column for column in COLUMNS if column.priority <= _most(width)]
    table = _table()
    for column in shown:
        is_name = column is COLUMNS[0]
        title = Text(column.title, style="bold underline" if column is order else "bold")
        table.add_column(title, justify="left" if is_name else "right", no_wrap=True, overflow="ellipsis", ratio=2 if is_name else None,
                         min_width=column.width)
    key = order.order
    ordered = sorted(rows, key=lambda row: row.name) if key is None else sorted(rows, key=lambda row: -key(row))
    for row in ordered:
        table.add_row(*(column.cell(row) for column in shown))
    return table


def groups_table(rows: Sequence[GroupRow], width: int, most: int) -> Table:
    """One line for each group, its ranks as squares; those that do not serve first, where there are too many."""
    table = _table()
    is_wide = width >= _WIDE
    num_ranks = _NUM_RANKS[not is_wide]
    table.add_column("group", ratio=2, no_wrap=True, overflow="ellipsis", min_width=14)
    table.add_column("state", no_wrap=True)
    table.add_column("ranks", no_wrap=True)
    for title in ("device", "memory", "steps/s") if is_wide else ("memory", "steps/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (row.state == "ready", row.model, row.id))[:most]:
        squares = Text("".join("■" if rank.is_ready else "□" for rank in row.ranks[:num_ranks]) or _UNKNOWN, style=_style(row.state))
        if len(row.ranks) > num_ranks:
            squares.append(f" +{len(row.ranks) - num_ranks}")
        limit = sum(rank.memory_limit_bytes for rank in row.ranks)
        memory = _bytes(sum(rank.memory_bytes for rank in row.ranks)) if row.ranks else _UNKNOWN
        cells: list[str | Text] = [memory + (f"/{_bytes(limit)}" if limit else ""),
                                   _number(max((rank.steps_per_s for rank in row.ranks), default=None))]
        if is_wide:
            cells.insert(0, _devices(row))
        epoch = f" ·{row.epoch}" if row.epoch > 1 else ""
        table.add_row(Text(row.id), Text(row.state.replace("_", " ") + epoch, style=_style(row.state)), squares, *cells)
    if len(rows) > most:
        table.add_row(Text(f"… and {len(rows) - most} more", style="bright_black"))
    return table


def _devices(row: GroupRow) -> str:
    devices = list(dict.fromkeys(rank.device for rank in row.ranks if rank.device))
    return (devices[0] + (f" +{len(devices) - 1}" if len(devices) > 1 else "")) if devices else _UNKNOWN


def _head(frame: Frame, order: Column, problem: str) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(frame.unix_s))
    head = Text(f"tensorway top  {at}  ", style="bold", no_wrap=True, overflow="ellipsis")
    head.append(f"q quits · s orders by {order.title}", style="bright_black")
    if problem:
        head.append(f"\n{problem}", style="red")
    if frame.unreached:
        head.append(f"\nno answer from the ops port of {', '.join(frame.unreached)}", style="yellow")
    return head


def _errors(frame: Frame, width: int) -> Table:
    table = _table()
    table.add_column("error", no_wrap=True)
    table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
    for error in frame.errors[:_NUM_ERRORS]:
        at = time.strftime("%H:%M:%S", time.localtime(float(error["unix_s"])))
        model = f" {error['model']}" if error["model"] and width >= _WIDE else ""
        table.add_row(Text(f"{at} {error['code']}{model}", style="red"), Text(str(error["sentence"])))
    return table


def _table() -> Table:
    return Table(expand=True, box=None, padding=(0, 1, 0, 0), header_style="bold", collapse_padding=True)


def _most(width: int) -> int:
    """The largest priority that there is room for."""
    return max((limit for limit in range(5)
                if sum(column.width + 1 for column in COLUMNS if column.priority <= limit) <= width), default=0)


def _style(state: str) -> str:
    return _STATES.get(state, "yellow")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.0f}h" if seconds < 172_800 else f"{seconds / 86_400:.0f}d"
