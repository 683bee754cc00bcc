"""`python -m benchmarks.overload` (make bench-overload): a real mesh offered more than it can do. Writes benchmarks/overload.md.

Requests of one long text arrive by a Poisson process, whatever became of those before, each with the same deadline; one in ten has a high
priority. Goodput is what was answered within its deadline, beside the capacity: the rate that a closed loop reached just before. The load
generator shares the machine's cores with the mesh, so the more is offered, the less of them is left: the cores that the rank got are shown
beside those that it had in the closed loop.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.cpu import CpuClock
from benchmarks.report import machine
from benchmarks.token_workload import ROOT
from tensorway import AsyncClient
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.errors import Status, TensorwayError
from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, GROUP, ORCHESTRATOR

MODEL: Final = "minilm"
TEXT: Final = "the quick brown fox jumps over the lazy dog while the orchestra tunes its strings " * 3
MULTIPLES: Final = (0.8, 1.0, 1.5, 2.0, 3.0)
HIGH_SHARE: Final = 0.1
HIGH_PRIORITY: Final = 10
CLOSED_LOOP: Final = 64


@dataclass
class Outcome:
    """What became of the requests of one load."""

    seconds: float
    answered: Counter[bool] = field(default_factory=Counter)
    sent: Counter[bool] = field(default_factory=Counter)
    late: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    #: Seconds from sending to refusal, and how many refusals said when to come back.
    refused_s: list[float] = field(default_factory=list)
    num_retry_infos: int = 0
    #: Seconds past the deadline of whatever came last.
    overdue_s: float = 0.0
    #: CPU seconds a second of the rank, and of all else that the requests cost: client, gateway and orchestrator.
    rank_cores: float = 0.0
    other_cores: float = 0.0

    @property
    def goodput(self) -> float:
        """Requests a second that were answered within their deadline."""
        return sum(self.answered.values()) / self.seconds


@dataclass
class Cores:
    """CPU seconds a second since the last look."""

    clock: CpuClock
    _seen: dict[str, int] = field(default_factory=dict)
    _at_s: float = 0.0

    def look(self) -> tuple[float, float]:
        """Of the rank, and of client, gateway and orchestrator together."""
        now_s, read = time.monotonic(), self.clock.read()
        took = {name: (value - self._seen.get(name, value)) / 1e9 / max(1e-9, now_s - self._at_s) for name, value in read.items()}
        self._seen, self._at_s = read, now_s
        return took.pop("rank"), sum(took.values())


async def measure_capacity(client: AsyncClient, seconds: float) -> float:
    """Requests a second of a closed loop."""
    num_answered = 0
    ends_s = time.monotonic() + seconds

    async def one_after_another() -> None:
        nonlocal num_answered
        while time.monotonic() < ends_s:
            await client.infer(MODEL, {"text": [TEXT]}, timeout_s=60)
            num_answered += 1

    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(CLOSED_LOOP):
            tasks.create_task(one_after_another())
    return num_answered / (time.monotonic() - began_s)


async def offer(client: AsyncClient, rate: float, timeout_s: float, seconds: float, seed: int) -> Outcome:
    """An open loop at `rate` requests a second."""
    draws = random.Random(seed)
    outcome = Outcome(seconds)

    async def request(is_high: bool) -> None:
        began_s = time.monotonic()
        outcome.sent[is_high] += 1
        try:
            priority = HIGH_PRIORITY if is_high else 0
            await client.infer(MODEL, {"text": [TEXT]}, timeout_s=timeout_s, priority=priority)
        except TensorwayError as error:
            took_s = time.monotonic() - began_s
            outcome.statuses[Status(error.status).name] += 1
            # What ended at its deadline was not refused but expired.
            if took_s < 0.9 * timeout_s:
                outcome.refused_s.append(took_s)
                outcome.num_retry_infos += error.retry_after_s > 0
        else:
            took_s = time.monotonic() - began_s
            if took_s <= timeout_s:
                outcome.answered[is_high] += 1
            else:
                outcome.late += 1
        outcome.overdue_s = max(outcome.overdue_s, took_s - timeout_s)

    next_s = time.monotonic()
    ends_s = next_s + seconds
    async with asyncio.TaskGroup() as tasks:
        while next_s < ends_s:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            tasks.create_task(request(draws.random() < HIGH_SHARE))
            next_s += draws.expovariate(rate)
    return outcome


def line(multiple: float, rate: float, capacity: float, closed_cores: float, outcome: Outcome) -> str:
    """A row of the table."""
    refused_ms = sorted(1e3 * took_s for took_s in outcome.refused_s)
    high = 100 * outcome.answered[True] / max(1, outcome.sent[True])
    low = 100 * outcome.answered[False] / max(1, outcome.sent[False])
    p50, p99 = (refused_ms[int(share * (len(refused_ms) - 1))] if refused_ms else 0.0 for share in (0.5, 0.99))
    told = f"{100 * outcome.num_retry_infos / len(refused_ms):.0f} %" if refused_ms else "none"
    statuses = ", ".join(f"{name} {number}" for name, number in outcome.statuses.most_common()) or "none"
    for_cores = 100 * outcome.goodput / capacity * closed_cores / max(1e-9, outcome.rank_cores)
    cells = (
        f"{multiple:g}", f"{rate:.0f}", f"{outcome.goodput:.1f}", f"{100 * outcome.goodput / capacity:.0f} %", f"{high:.1f} %",
        f"{low:.1f} %", f"{closed_cores:.2f} / {outcome.rank_cores:.2f}", f"{outcome.other_cores:.2f}", f"{for_cores:.0f} %",
        f"{p50:.0f} / {p99:.0f}", told, str(outcome.late), f"{1e3 * max(0.0, outcome.overdue_s):.0f}", statuses,
    )
    return f"| {' | '.join(cells)} |"


async def bench(seconds: float, timeout_s: float, seed: int) -> str:
    """Starts a mesh, loads it, and returns the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared: dict[str, object] = {
            "registry": f"directory:{folder}/registry", "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log_format": "text",
        }
        async with LocalMesh(folder / "logs") as mesh, DirectoryRegistry(folder / "registry") as registry:
            await mesh.start([
                MemberPlan("gateway", "gateway", flags_of(shared)),
                MemberPlan("orchestrator", "orchestrator", flags_of(shared)),
                MemberPlan("node", "node", flags_of({**shared, "models_dir": str(ROOT / "models"), "models": f'["{MODEL}"]'})),
            ])
            pids = {"client": (os.getpid(),)}
            async with asyncio.timeout(120):
                for name, kind in (("gateway", GATEWAY), ("orchestrator", ORCHESTRATOR), ("rank", GROUP)):
                    async for members in registry.watch(kind):
                        if members:
                            pids[name] = (int(members[0].metadata["pid"]),)
                            break
                endpoint = (await registry.registrations(GATEWAY))[0].endpoint
            cores = Cores(CpuClock(pids))
            async with AsyncClient(endpoint, retries=0) as client:
                await measure_capacity(client, seconds / 2)  # warms up
                rows = []
                for multiple in MULTIPLES:
                    cores.look()
                    capacity = await measure_capacity(client, seconds)
                    closed_cores, _ = cores.look()
                    outcome = await offer(client, multiple * capacity, timeout_s, seconds, seed)
                    outcome.rank_cores, outcome.other_cores = cores.look()
                    rows.append(line(multiple, multiple * capacity, capacity, closed_cores, outcome))
                    print(rows[-1], flush=True)
                return "\n".join(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load, seconds (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=3.0, help="of each request, seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default: %(default)s)")
    options = parser.parse_args()
    table = asyncio.run(bench(options.seconds, options.deadline, options.seed))
    target = ROOT / "benchmarks" / "overload.md"
    target.write_text(
        f"# Overload\n\n`python -m benchmarks.overload --seconds {options.seconds:g}` (make bench-overload), "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine().rstrip('.')}. "
        f"Model `{MODEL}`, one text of "
        f"{len(TEXT.split())} words a request, deadline {options.deadline:g} s, one request in ten with a high priority. Goodput: answers "
        "within their deadline, beside the capacity that a closed loop of 64 reached just before; refusals: milliseconds from sending to "
        "hearing no, and how many of them said when to come back (RetryInfo).\n\n"
        "| times capacity | offered /s | goodput /s | of capacity | high priority answered | others | cores of the rank, closed loop / now "
        "| of client, gateway, orchestrator | goodput for the rank's cores | refused after ms, p50 / p99 "
        "| with RetryInfo | late answers | latest, ms past deadline | errors |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        f"{table}\n"
    )
    print(f"{target} written")


if __name__ == "__main__":
    main()
