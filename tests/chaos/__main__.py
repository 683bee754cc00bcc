"""`python -m tests.chaos`: the mesh under fire. Ends with status 1 where an aim is missed."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.chaos.fleet import WHOLE
from tests.chaos.hosts import network_obstacle
from tests.chaos.load import Mix
from tests.chaos.report import terminal_table, write_page
from tests.chaos.scenarios import SCENARIOS, Scenario, obstacle
from tests.chaos.suite import Outcome, Pace, run_scenarios
from tests.chaos.world import Shape

#: All of it, at most.
LIMIT_S: Final = 900.0
_FILE_COLUMNS: Final = 200


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ends with status 2 for what it does not understand."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="A mesh under load, hurt by one fault after another.")
    parser.add_argument("--list", action="store_true", help="list the scenarios and why one cannot be run here")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run these scenarios only; NAME may hold * and ?")
    parser.add_argument("--seed", type=int, default=1, help="decides the load and whom faults strike")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="begin no scenario after so many seconds")
    parser.add_argument("--registry", choices=("consul", "directory", "both"), default="both",
                        help="both: Consul, then a directory for what needs one")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table as a page")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the services' logs")
    given = parser.parse_args(argv)
    given.began_s = time.monotonic()
    given.scenarios = _chosen(parser, given.only)
    return given


def _chosen(parser: argparse.ArgumentParser, only: list[str]) -> list[Scenario]:
    if not only:
        return list(SCENARIOS)
    chosen = [scenario for scenario in SCENARIOS if any(fnmatchcase(scenario.name, pattern) for pattern in only)]
    for pattern in only:
        if not any(fnmatchcase(scenario.name, pattern) for scenario in SCENARIOS):
            parser.error(f"--only: no scenario is called {pattern!r}; see --list")
    return chosen


def show_list(console: Console, registry: str) -> None:
    """One line for each scenario."""
    for scenario in SCENARIOS:
        kinds = ("consul", "directory") if registry == "both" else (registry,)
        why = min((obstacle(scenario, kind) for kind in kinds), key=len)
        console.print(f"[bold]{scenario.name:28}[/] {scenario.what}" + (f" [dim](not here: {why})[/]" if why else ""))


def parts(scenarios: list[Scenario], registry: str) -> list[tuple[str, list[Scenario]]]:
    """The registries to run on, and what on each: with both, a directory has only what Consul cannot show."""
    if registry != "both":
        return [(registry, scenarios)]
    on_directory = [scenario for scenario in scenarios if "small disk" in scenario.fault.needs]
    return [(kind, some) for kind, some in (
        ("consul", [scenario for scenario in scenarios if scenario not in on_directory]), ("directory", on_directory),
    ) if some]


async def run(given: argparse.Namespace, console: Console) -> list[Outcome]:
    """All that was asked for."""
    until_s = given.began_s + given.seconds
    outcomes: list[Outcome] = []
    columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(given.scenarios))

        def tell(line: str) -> None:
            progress.update(bar, description=line)
            if not console.is_terminal:
                console.print(line)

        def on_outcome(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(bar)
            show_outcome(console, outcome)

        for registry, scenarios in parts(given.scenarios, given.registry):
            shape = Shape(registry, WHOLE)
            await run_scenarios(scenarios, shape, Mix(), given.seed, Pace(), tell, on_outcome, until_s, given.logs)
    return outcomes


def show_outcome(console: Console, outcome: Outcome) -> None:
    """One scenario as it ends: a line, and what was not as it should be."""
    name, verdict = outcome.scenario.name, outcome.verdict
    if outcome.skipped:
        console.print(f"[dim]- {name}: skipped, {outcome.skipped}[/]")
    elif outcome.is_good:
        console.print(f"[green]✔[/] {name} ({outcome.struck}): {verdict.ok} of {verdict.sent} right, "
                      f"steady after {verdict.recovery_s:.1f} s, slowest {verdict.slowest_s:.1f} s")
    else:
        console.print(f"[red]✘[/] {name} ({outcome.struck}): {'; '.join(outcome.misses)}", markup=True)
        for example in verdict.examples:
            console.print(f"    {example}", style="dim", markup=False)


def _console() -> Console:
    """The terminal; wide enough for the table where the output goes to a file."""
    return Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=_FILE_COLUMNS)


def main() -> int:
    given, console = parse(sys.argv[1:]), _console()
    if given.list:
        show_list(console, given.registry)
        return 0
    if missing := WHOLE.missing():
        console.print(f"the files of {', '.join(missing)} are missing: run `make models`")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends as tidily as Ctrl-C does
    try:
        outcomes = asyncio.run(run(given, console))
    except KeyboardInterrupt:
        return 130
    console.print(terminal_table(outcomes))
    if given.report is not None:
        command = shlex.join(["python", "-m", "tests.chaos", *sys.argv[1:]])
        write_page(given.report, outcomes, Mix(), command, time.monotonic() - given.began_s, not network_obstacle())
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
