"""One rank of a group that is measured without a node: `python -m benchmarks.group_rank JOB.json RANK`. Started by `benchmarks.groups`.

Rank 0 carries out the job and prints what it measured as JSON; the others serve, and measure their own part alone when they are asked to.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch.distributed import FileStore

from tensorway.model_directory import load_directory
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.port import Cut
from tensorway_worker.rank.formation import _agree
from tensorway_worker.rank.group import LinkedGroup
from tensorway_worker.rank.rpc import Membership
from tensorway_worker.topology import Topology

Carry = dict[str, torch.Tensor]


class Echo:
    """A model that costs nothing: what remains is the way there and back."""

    device = "cpu"

    def run(self, inputs: Carry) -> Carry:
        return inputs


class Recording:
    """An engine that keeps the last thing it was given, so that its part can be measured alone."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.given: Carry = {}

    def run(self, inputs: Carry) -> Carry:
        self.given = dict(inputs)
        return dict(self.engine.run(inputs))


class TorchThread:
    """The rank's one torch thread, and how long it has worked."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.busy_s = 0.0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with torch.inference_mode():
            while True:
                work = self.queue.get()
                began_s = time.perf_counter()
                work()
                self.busy_s += time.perf_counter() - began_s

    def run(self, call: Callable[[], Any]) -> Any:
        """Runs `call` in the torch thread and waits for it."""
        done = threading.Event()
        result: list[Any] = []

        def work() -> None:
            result.append(call())
            done.set()

        self.queue.put(work)
        done.wait()
        return result[0]


def p50_s(call: Callable[[], object], seconds: float, at_least: int = 10) -> float:
    """Median time of a call, after two to warm up."""
    call(), call()
    times: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(times) < at_least:
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


class Bench:
    """One rank's side of all measurements."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.job, self.rank = job, rank
        self.topology = Topology(job["pipeline"], job["tensor"])
        torch.set_num_threads(job["threads"])
        self.thread = TorchThread()
        self.thread.run(partial(torch.set_num_threads, job["threads"]))
        self.store = FileStore(job["store"], self.topology.world_size)
        self.folder = Path(job["model"]) if job["model"] else Path(job["store"]).parent
        membership = Membership(rank, self.topology.world_size, 1, "0" * 64, 60.0)
        self.group = LinkedGroup(self.topology, membership, self.folder, self.thread.queue.put, lambda lost: os._exit(f"{lost}" != ""))
        self.collective = self.thread.run(lambda: self.group.join(self.store, "lo"))
        self.recording = Recording(self.thread.run(self._load) if job["model"] else Echo())
        self.group.attach(self.recording)  # type: ignore[arg-type]

    def _load(self) -> Any:
        place = self.topology.place(self.rank)
        with torch.inference_mode(False), torch.no_grad():
            engine = open_engine(load_directory(self.folder), "cpu", Cut(place, self.collective, partial(_agree, self.store, self.rank)))
            engine.load()
        return engine

    def lead(self) -> dict[str, Any]:
        """Rank 0: carries out the job."""
        found = {key: getattr(self, f"measure_{key}")() for key in self.job["measure"]}
        self.store.set("bare/end", "1")
        return found

    def measure_hop(self) -> dict[str, float]:
        """Size -> p50 of a step that does nothing: there, and back with the same bytes."""
        found: dict[str, float] = {}
        for size in self.job["sizes"]:
            inputs = {"x": torch.zeros(1, size // 4)}
            found[str(size)] = p50_s(partial(self.group.run, inputs), self.job["seconds"])
        return found

    def measure_steps(self) -> dict[str, Any]:
        """Rows -> p50 of the group's step in one piece, and of each rank's part measured alone, one stage after the other."""
        found: dict[str, Any] = {}
        self.group.wanted_micro_batches = 1
        for rows in self.job["rows"]:
            inputs = model_inputs(self.job["inputs"], rows)
            step_s = p50_s(partial(self.group.run, inputs), self.job["seconds"])
            parts: list[float] = []
            for stage in range(self.topology.pipeline):
                ranks = self.topology.stage_ranks(stage)
                self.store.set(f"bare/{rows}/{stage}", "1")
                own = self.part_s() if self.rank in ranks else 0.0
                parts.append(max([own, *(float(self.store.get(f"bare/{rows}/{stage}/{rank}")) for rank in ranks if rank != self.rank)]))
            found[str(rows)] = {"step_s": step_s, "parts_s": parts}
        return found

    def part_s(self) -> float:
        """p50 of this rank's own part on what it was last given. Shards make the same number of calls, or their sums would not meet."""
        given = self.recording.given
        count = self.job["part_calls"]

        def measure() -> float:
            times: list[float] = []
            for _ in range(count):
                began_s = time.perf_counter()
                self.recording.engine.run(dict(given))
                times.append(time.perf_counter() - began_s)
            return statistics.median(times[2:])

        return float(self.thread.run(measure))

    def measure_throughput(self) -> dict[str, Any]:
        """Micro-batches -> rows/s with two batches on their way, and the share of the time that each stage computed."""
        found: dict[str, Any] = {}
        rows = max(self.job["rows"])
        for wanted in (1, 2, 4):
            self.group.wanted_micro_batches = wanted
            inputs = model_inputs(self.job["inputs"], rows)
            for in_flight in (1, 2):
                self.group.run(inputs)
                before = self.busy_all()
                began_s = time.perf_counter()
                num_rows = self._drive(inputs, rows, in_flight)
                elapsed_s = time.perf_counter() - began_s
                busy = [round((after - start) / elapsed_s, 3) for start, after in zip(before, self.busy_all(), strict=True)]
                found[f"{wanted}/{in_flight}"] = {"rows_per_s": num_rows / elapsed_s, "busy": busy}
        return found

    def _drive(self, inputs: Carry, rows: int, in_flight: int) -> int:
        """Batches from `in_flight` threads for the job's seconds; returns the rows that came back."""
        end_s = time.perf_counter() + self.job["seconds"]
        counts = [0] * in_flight

        def one(place: int) -> None:
            while time.perf_counter() < end_s:
                self.group.run(inputs)
                counts[place] += rows

        threads = [threading.Thread(target=one, args=(place,)) for place in range(in_flight)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)

    def busy_all(self) -> list[float]:
        """Seconds that each rank's torch thread has worked."""
        number = self.store.add("busy/number", 1)
        self.store.set(f"busy/{number}", "1")
        return [self.thread.busy_s, *(float(self.store.get(f"busy/{number}/{rank}")) for rank in range(1, self.topology.world_size))]

    def follow(self) -> None:
        """Any other rank: measures when asked, until the leader is done."""
        place = self.topology.place(self.rank)
        threading.Thread(target=self._tell_busy, daemon=True).start()
        if "steps" in self.job["measure"]:
            for rows in self.job["rows"]:
                key = f"bare/{rows}/{place.stage}"
                self.store.get(key)
                self.store.set(f"{key}/{self.rank}", str(self.part_s()))
        self.store.get("bare/end")

    def _tell_busy(self) -> None:
        number = 1
        while True:
            self.store.get(f"busy/{number}")
            self.store.set(f"busy/{number}/{self.rank}", str(self.thread.busy_s))
            number += 1


def model_inputs(names: dict[str, int], rows: int) -> Carry:
    """Token ids below `names[name]`, 16 to a row; 1 for a mask that sees all of them; pictures for a negative number."""
    generator = torch.Generator().manual_seed(rows)
    found: Carry = {}
    for name, largest in names.items():
        if largest < 0:
            found[name] = torch.rand(rows, 3, 224, 224, generator=generator)
        else:
            is_mask = largest <= 1
            found[name] = torch.ones(rows, 16, dtype=torch.int64) if is_mask else torch.randint(1, largest, (rows, 16), generator=generator)
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank = int(sys.argv[2])
    bench = Bench(job, rank)
    if rank == 0:
        print(json.dumps(bench.lead()), flush=True)
    else:
        bench.follow()
    os._exit(0)


if __name__ == "__main__":
    main()
