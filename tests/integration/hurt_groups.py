"""Model directories of groups of several ranks, orders for single ranks, and what a node says of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tensorway.deadline import Deadline
from tensorway.errors import TensorwayError
from tensorway.registry.port import NODES
from tensorway.tensors import DataType
from tensorway.transport import create_link_client
from tensorway.v1 import link_pb2
from tests.integration.conftest import MODELS, TEST_MODELS, Mesh

WIDTH = 8
NUM_LAYERS = 4
SLEEP, RAISE, FILL = 1, 2, 3
#: Longer than any group needs to be formed anew on a busy machine.
RECOVERY_S = 60.0
Array = np.ndarray[Any, Any]
Report = dict[str, Any]


def weights() -> dict[str, Array]:
    """The layers' weights, by name."""
    random = np.random.default_rng(7)
    shapes = {"up.weight": (2 * WIDTH, WIDTH), "up.bias": (2 * WIDTH,), "down.weight": (WIDTH, 2 * WIDTH), "down.bias": (WIDTH,)}
    return {
        f"{index}.{name}": (random.standard_normal(shape) * 0.1).astype(np.float32)
        for index in range(NUM_LAYERS) for name, shape in shapes.items()
    }


def staged(models: Path, pipeline: int, tensor: int, name: str = "", **more: Any) -> str:
    """Adds tests/models/staged to `models`, cut like this, and returns its name. `more`: further keys of model.yaml."""
    name = name or f"staged-{pipeline}x{tensor}"
    target = models / name
    shutil.copytree(TEST_MODELS / "staged", target, ignore=shutil.ignore_patterns("__pycache__"))
    file = target / "files" / "weights.safetensors"
    file.parent.mkdir()
    save_file(weights(), file)
    document = yaml.safe_load((target / "model.yaml").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = {"tensor_plan": {"*.up": "colwise", "*.down": "rowwise"}, **more.pop("settings", {})}
    document |= {
        "name": name, "parallel": {"pipeline": pipeline, "tensor": tensor, "verify": "off", **more.pop("parallel", {})},
        "files": [{"path": file.name, "source": "made by the test", "sha256": sha256}], "settings": settings, **more,
    }
    (target / "model.yaml").write_text(yaml.safe_dump(document))
    return name


def real(models: Path, source: str, name: str, **more: Any) -> str:
    """Adds one of models/ under another name, its files linked; `more`: keys of model.yaml."""
    target = models / name
    shutil.copytree(MODELS / source, target, ignore=shutil.ignore_patterns("__pycache__", "files"))
    (target / "files").symlink_to(MODELS / source / "files")
    document = yaml.safe_load((target / "model.yaml").read_text())
    (target / "model.yaml").write_text(yaml.safe_dump({**document, "name": name, **more}))
    return name


def ask(*orders: tuple[int, int, int], rows: int = 1) -> dict[str, Array]:
    """Inputs of a staged model; the orders are for the first rows: (rank, what, amount)."""
    order = np.zeros((rows, 3), np.int64)
    for row, (rank, what, amount) in enumerate(orders):
        order[row] = (1 << rank, what, amount)
    return {"x": np.linspace(-1, 1, rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH), "order": order}


def is_right(inputs: dict[str, Array], output: Array) -> bool:
    """Whether a staged model's answer is the one that numpy computes."""
    layers, x = weights(), inputs["x"]
    for index in range(NUM_LAYERS):
        hidden = np.maximum(x @ layers[f"{index}.up.weight"].T + layers[f"{index}.up.bias"], 0)
        x = x + hidden @ layers[f"{index}.down.weight"].T + layers[f"{index}.down.bias"]
    return bool(np.allclose(output, x, atol=1e-5))


@dataclass(eq=False)
class History:
    """Everything that the nodes' documents in the registry have said of their groups, in order."""

    mesh: Mesh
    said: list[Report] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self) -> None:
        """Until cancelled."""
        async for documents in self.mesh.registry.watch_documents(NODES):
            self.said += [group for document in documents.values() for group in json.loads(document)["groups"]]
            self.changed.set()

    async def until(self, is_so: Callable[[Report], bool], since: int = 0) -> Report:
        """The first report from number `since` on of which that holds."""
        try:
            async with asyncio.timeout(RECOVERY_S):
                while True:
                    for report in self.said[since:]:
                        if is_so(report):
                            return report
                    since = max(since, len(self.said))
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"never said\n{self.mesh.logs()}") from None

    async def ready(self, model: str, epoch: int = 1) -> Report:
        """The newest report of a group that serves in that epoch or a later one."""
        def serves(report: Report) -> bool:
            return bool(report["model"] == model and report["state"] == "ready" and report["epoch"] >= epoch)

        await self.until(serves)
        return next(report for report in reversed(self.said) if serves(report))

    async def why(self, model: str, epoch: int) -> str:
        """Why that epoch ended."""
        found = await self.until(lambda one: one["model"] == model and one["reason"].startswith(f"epoch {epoch}: "))
        return str(found["reason"].removeprefix(f"epoch {epoch}: "))


@asynccontextmanager
async def history_of(mesh: Mesh) -> AsyncIterator[History]:
    """Follows the nodes' documents while the block runs."""
    async with asyncio.TaskGroup() as tasks:
        history = History(mesh)
        following = tasks.create_task(history.follow())
        yield history
        following.cancel()


async def send_for_epoch(report: Report, epoch: int) -> TensorwayError | None:
    """Sends a leader one batch by hand over a link of its own, stamped with `epoch`; what it says against the whole batch."""
    inputs = ask()
    head = link_pb2.RequestHead(request_id="by-hand", inputs=[
        link_pb2.TensorHead(name="x", dtype=int(DataType.FP32), shape=(1, WIDTH), num_bytes=4 * WIDTH),  # type: ignore[arg-type]
        link_pb2.TensorHead(name="order", dtype=int(DataType.INT64), shape=(1, 3), num_bytes=24),  # type: ignore[arg-type]
    ])
    batch = link_pb2.BatchHead(batch_id=1, epoch=epoch, requests=[head.SerializeToString()], remaining_us=[10_000_000])
    client = create_link_client(report["endpoint"])
    deadline = Deadline.after(10.0)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(client.run())
        try:
            await client.wait_connected(deadline)
            await client.call(batch.SerializeToString(), (inputs["x"].tobytes(), inputs["order"].tobytes()), deadline)
        except TensorwayError as error:
            return error
        finally:
            running.cancel()
    return None


def pids_of(report: Report) -> list[int]:
    return [rank["pid"] for rank in report["ranks"]]


def sessions(*leaders: int) -> set[int]:
    """All processes, zombies too, of the sessions that these processes lead."""
    return {pid for pid in every_process() if _stat(pid)[3:4] and int(_stat(pid)[3]) in leaders}


def children(parent: int) -> dict[int, str]:
    """Processes below `parent`, at any depth, and their states (Z: a zombie)."""
    stats = {pid: stat for pid in every_process() if (stat := _stat(pid))}
    found: dict[int, str] = {}
    new = {parent}
    while new:
        new = {pid for pid, stat in stats.items() if int(stat[1]) in new}
        found |= {pid: stats[pid][0] for pid in new}
    return found


def has_ended(pid: int) -> bool:
    """Whether a process runs no more, though its new parent may not have reaped it yet."""
    return _stat(pid)[:1] in ([], ["Z"])


def every_process() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _stat(pid: int) -> list[str]:
    """From the third field of /proc/PID/stat on (proc(5)): state, parent, process group, session; empty once it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def listening_of(pids: Iterable[int]) -> set[str]:
    """Sockets on which these processes accept TCP connections, by inode."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
    return {link for pid in pids for link in _links(pid) if link in inodes}


def _links(pid: int) -> list[str]:
    """What a process's descriptors stand for; none once it has gone."""
    found: list[str] = []
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                found.append(os.readlink(entry.path))
    except OSError:
        return found
    return found
