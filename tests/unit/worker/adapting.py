"""AdaptModel through a real server and real ranks, and the same training done by plain torch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cut_ranks import author_directory
from safetensors.torch import load_file, save_file

from tensorway.model_directory import load_directory
from tensorway.tensors import Tensor
from tensorway.transport import AsyncChannel, create_server
from tensorway.transport.port import ServerOptions
from tensorway.v1 import node_pb2, tensor_pb2
from tensorway_worker.adaptation import AdaptationHost
from tensorway_worker.adaptation_wire import ADAPT_MODEL
from tensorway_worker.devices import DevicePool
from tensorway_worker.engines import open_engine
from tensorway_worker.engines.rewriting import Adaptable
from tensorway_worker.rank.adaptation_losses import loss_of, row_batches
from tensorway_worker.rank.received import DATA_TYPE_OF, bytes_of
from tensorway_worker.settings import NodeSettings


async def three_at_a_time(*scenarios: Coroutine[Any, Any, None]) -> None:
    """Plays all of them; the first that fails ends the others. Ranks spend most of their lives on starting, which keeps one core busy: more
    of them at once would only wait for each other."""
    places = asyncio.Semaphore(3)

    async def play(scenario: Coroutine[Any, Any, None]) -> None:
        async with places:
            await scenario

    async with asyncio.TaskGroup() as tasks:
        for scenario in scenarios:
            tasks.create_task(play(scenario))


@dataclass
class Asked:
    """A node's answers."""

    host: AdaptationHost
    endpoint: str
    adapted_dir: Path
    losses: list[float] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    def again(self) -> Asked:
        """Another caller of the same node."""
        return Asked(self.host, self.endpoint, self.adapted_dir)

    async def adapt(self, **fields: object) -> node_pb2.AdaptedModel:
        """The whole of one call; its last message."""
        self.losses.clear()
        channel = AsyncChannel(self.endpoint)
        stream = channel.server_stream(ADAPT_MODEL, node_pb2.AdaptModelRequest(**fields).SerializeToString(), None)
        try:
            message = None
            while (read := await stream.read()) is not None:
                message = node_pb2.AdaptModelResponse.FromString(read)
                self.states.append(message.state)
                if message.state == node_pb2.ADAPTATION_STATE_TRAINING and message.step > len(self.losses):
                    self.losses.append(message.loss)
            assert message is not None
            return message.adapted
        finally:
            await stream.cancel()
            await channel.close()


@asynccontextmanager
async def node(folder: Path, *models: Path, **settings: object) -> AsyncIterator[Asked]:
    """A server that adapts the models; ranks end with it."""
    found = NodeSettings(**{
        "models_dir": str(models[0].parent), "adapted_dir": str(folder / "adapted"), "allow_adaptation": True, "heartbeat_s": 0.1,
        "registry": f"directory:{folder / 'registry'}", "threads": 1, **settings,
    })  # type: ignore[arg-type]
    directories = [load_directory(path) for path in models]
    host = AdaptationHost("node-1", {one.spec.revision: one for one in directories}, found, DevicePool(()))
    server = create_server(ServerOptions("127.0.0.1:0"))
    host.attach(server)
    endpoint = await server.start()
    try:
        yield Asked(host, endpoint, folder / "adapted")
    finally:
        await server.stop(0.0)


def author(folder: Path, parallel: str = "{}", *, staged: bool = False, extra: str = "", filler: int = 0) -> Path:
    """The author's model of `cut_ranks` with a tied head, cut as asked, in a directory of its own with its weights declared.

    `filler`: further numbers in the weights file, which the model does not use.
    """
    path = folder / "net"
    path.mkdir(parents=True)
    author_directory(path, staged=staged)
    weights = path / "files" / "net.safetensors"
    if filler:
        save_file({**load_file(weights), "filler": torch.zeros(filler)}, weights)
    declared = f"files: [{{path: net.safetensors, source: nowhere, sha256: {hashlib.sha256(weights.read_bytes()).hexdigest()}}}]\n"
    text = (path / "model.yaml").read_text()
    if extra:
        text = text.replace("settings: {", f"settings: {{{extra}, ")
    (path / "model.yaml").write_text(f"{text}{declared}parallel: {parallel}\nthreads: 1\n")
    return path


def message(name: str, value: torch.Tensor) -> tensor_pb2.Tensor:
    dtype = DATA_TYPE_OF[value.dtype]
    return tensor_pb2.Tensor(name=name, dtype=dtype, shape=value.shape, data=bytes(bytes_of(value)))  # type: ignore[arg-type]


def messages(values: Mapping[str, torch.Tensor]) -> list[tensor_pb2.Tensor]:
    return [message(name, value) for name, value in values.items()]


def received(tensor: tensor_pb2.Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.data)


@dataclass(frozen=True)
class Locally:
    """What plain torch makes of the same order."""

    losses: list[float]
    #: Stored name -> trained weight.
    weights: dict[str, torch.Tensor]
    num_parameters: int


def locally(
    path: Path, inputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], *, loss: str,
    optimizer: type[torch.optim.Optimizer], rate: float, steps: int, rows: int, seed: int = 0,
) -> Locally:
    """The uncut model of `path`, trained in this process."""
    engine = open_engine(load_directory(path), "cpu")
    engine.load()
    assert isinstance(engine, Adaptable)
    held = engine.held_weights()
    for one in held:
        one.parameter.requires_grad_(True)
    made = optimizer([one.parameter for one in held], lr=rate)
    batches = row_batches(len(next(iter(inputs.values()))), rows, seed)
    losses: list[float] = []
    for _ in range(steps):
        chosen = next(batches)
        made.zero_grad()
        outputs = engine.run({name: value[chosen] for name, value in inputs.items()})
        found = loss_of(loss, outputs, {name: value[chosen] for name, value in targets.items()})
        found.backward()
        made.step()
        losses.append(found.item())
    weights = {place.name: one.parameter.detach() for one in held for place in one.stored}
    return Locally(losses, weights, sum(one.parameter.numel() for one in held))


def written(adapted: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(adapted / "files" / file)


def left_over(adapted_dir: Path) -> list[str]:
    """What lies there besides finished directories."""
    return [path.name for path in adapted_dir.iterdir() if not (path / "model.yaml").is_file()] if adapted_dir.is_dir() else []
