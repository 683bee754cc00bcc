"""Outcomes as tables: on a terminal, and as the committed page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import grpc
import torch
from rich.table import Table

from tests.chaos.load import Mix
from tests.chaos.suite import Outcome

_COLUMNS: Final = (
    "scenario", "registry", "sent", "success", "lost", "refused", "wrong", "twice", "late", "steady again, s", "whole again, s",
    "p99 before, ms", "p99 during, ms", "p99 after, ms", "slowest, s",
)
_INTRODUCTION: Final = """# The mesh under fire

Measured by `{command}` on {date}, in {minutes:.0f} minutes. {hosts}

Load, through both gateways, for the whole time: {identity:g} requests/s to `identity` (bytes compared), {embedding:g}/s to MiniLM
(embeddings compared to 1e-4), {stream:g} streams/s of SmolLM2 (tokens compared one by one). Deadlines: {timeout:g} s; streams
{stream_timeout:g} s.

Machine: {cores} cores, Linux {kernel}, CPython {python}; grpcio {grpcio}, torch {torch}. The whole mesh and its clients run on these
cores: a rank that starts anew takes CPU from everybody, which the 99th percentiles show.

`docs/chaos.md` says what the columns mean. Aims: 0 lost, 0 refused, 0 wrong, 0 twice, 0 late, 99.9 % success.
"""


def row(outcome: Outcome) -> tuple[str, ...]:
    """One outcome in the order of the columns."""
    verdict = outcome.verdict
    name = (outcome.scenario.name, outcome.registry)
    if outcome.skipped or not verdict.sent:
        return (*name, *("-" for _ in _COLUMNS[2:]))
    return (
        *name, str(verdict.sent), f"{verdict.success:.2%}", str(verdict.lost), str(verdict.refused), str(verdict.wrong), str(verdict.twice),
        str(verdict.late), _seconds(verdict.recovery_s), _seconds(outcome.whole_s), *(
            f"{1000 * value:.0f}" for value in (verdict.p99_before_s, verdict.p99_during_s, verdict.p99_after_s)
        ), f"{verdict.slowest_s:.1f}",
    )


def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """For a person who waits."""
    table = Table(title="the mesh under fire")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("scenario", "registry") else "right")
    for outcome in outcomes:
        table.add_row(*row(outcome), style="dim" if outcome.skipped else "" if outcome.is_good else "bold red")
    return table


def write_page(path: Path, outcomes: Sequence[Outcome], mix: Mix, command: str, took_s: float, has_network: bool) -> None:
    """The committed page; `command` is what was typed."""
    hosts = "Each host in a network namespace of its own." if has_network else "All hosts on loopback addresses: no network faults."
    lines = [_INTRODUCTION.format(
        date=datetime.now(UTC).date(), command=command, minutes=took_s / 60, hosts=hosts,
        identity=mix.identity, embedding=mix.embedding, stream=mix.stream,
        timeout=mix.timeout_s, stream_timeout=mix.stream_timeout_s, cores=_num_cores(), kernel=platform.release().split("-")[0],
        python=platform.python_version(), grpcio=grpc.__version__, torch=torch.__version__,
    )]
    ran = [outcome for outcome in outcomes if not outcome.skipped]
    lines += [f"| {' | '.join(_COLUMNS)} |", f"| --- | --- |{' ---: |' * (len(_COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(row(outcome))} |" for outcome in ran]
    sent, streams = sum(outcome.verdict.sent for outcome in ran), sum(outcome.verdict.streams for outcome in ran)
    ok, tokens = sum(outcome.verdict.ok for outcome in ran), sum(outcome.verdict.tokens for outcome in ran)
    good = sum(outcome.is_good for outcome in ran)
    lines += ["", f"{good} of {len(ran)} scenarios met every aim; {ok} of {sent} requests were answered and right, among them "
              f"{streams} streams with {tokens} tokens.", *_resolution(ran), "",
              "## The faults", "", "| scenario | fault |", "| --- | --- |"]
    lines += [f"| {outcome.scenario.name} | {outcome.scenario.what} |" for outcome in ran]
    lines += _missed(ran)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _resolution(outcomes: Sequence[Outcome]) -> list[str]:
    """What so many requests can show: with no failure among n, at most 3 / n fail (95 % confidence; Hanley and Lippman-Hand, 1983)."""
    sent = [outcome.verdict.sent for outcome in outcomes if outcome.verdict.sent]
    if not sent:
        return []
    return [f"No failure in the smallest scenario bounds the share that fails at {3 / min(sent):.2%} (95 % confidence), in all together at "
            f"{3 / sum(sent):.3%}: one scenario alone cannot show 99.9 %."]


def _missed(outcomes: Sequence[Outcome]) -> list[str]:
    missed = [outcome for outcome in outcomes if not outcome.is_good]
    if not missed:
        return []
    return ["", "## Aims that were missed", "", *(
        f"- {outcome.scenario.name} ({outcome.registry}): {'; '.join(outcome.misses)}" for outcome in missed
    )]


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _num_cores() -> int:
    return os.cpu_count() or 1
