"""A real gateway in this process, a real directory registry, and orchestrators that answer by script over real links."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import DESIRED, GROUP, ORCHESTRATOR, Lease, Registration
from tensorway.revisions import encode_revision, revision_key
from tensorway.service import ServiceContext
from tensorway.signature import Batching, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import DataType
from tensorway.transport import HealthService, LinkServer, add_reflection, create_server
from tensorway.transport.port import Exchange, Payload, Server, ServerOptions
from tensorway.v1 import link_pb2
from tensorway_gateway.service import Gateway
from tensorway_gateway.settings import GatewaySettings


def spec(
    model: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    revision: str = "",
    version: str = "1",
    **batching: object,
) -> RevisionSpec:
    return RevisionSpec(
        model=model, revision=revision or model.encode().hex().ljust(64, "0"), version=version, description=f"the {model} model",
        engine="python", signature=Signature(inputs, outputs), batching=Batching(**batching), num_replicas=1,  # type: ignore[arg-type]
        default_timeout_s=20.0,
    )


#: Batchable; the answer is the input.
ECHO = spec(
    "echo", (TensorSpec("x", DataType.FP32, ("rows", "n")),), (TensorSpec("y", DataType.FP32, ("rows", "n")),), max_rows=8, max_delay_ms=2.0
)
WORDS = spec("words", (TensorSpec("text", DataType.BYTES, ("rows",)),), (TensorSpec("shouted", DataType.BYTES, ("rows",)),))
#: Never batched; three inputs and outputs, one of them a scalar.
MIXED = spec(
    "mixed",
    (TensorSpec("a", DataType.INT64, ("n", 2)), TensorSpec("b", DataType.INT8, ("n",)), TensorSpec("flag", DataType.BOOL, ())),
    (TensorSpec("a2", DataType.INT64, ("n", 2)), TensorSpec("b2", DataType.INT8, ("n",)), TensorSpec("flag2", DataType.BOOL, ())),
)
BRAIN = spec("brain", (TensorSpec("h", DataType.BF16, ("rows", 2)),), (TensorSpec("h2", DataType.BF16, ("rows", 2)),))
SPECS = (ECHO, WORDS, MIXED, BRAIN)


def echo_reply(head: link_pb2.RequestHead, payload: Payload, specs: tuple[RevisionSpec, ...] = SPECS) -> tuple[bytes, Payload]:
    """Each output is the input at its place; requested outputs only, in the order asked for."""
    found = next(item for item in specs if item.model == head.model)
    content, offset = b"".join(payload), 0
    outputs: dict[str, tuple[link_pb2.TensorHead, bytes]] = {}
    places = {item.name: index for index, item in enumerate(found.signature.inputs)}
    for tensor in head.inputs:
        name = found.signature.outputs[places[tensor.name]].name
        outputs[name] = (
            link_pb2.TensorHead(name=name, dtype=tensor.dtype, shape=tensor.shape, num_bytes=tensor.num_bytes),
            content[offset : offset + tensor.num_bytes],
        )
        offset += tensor.num_bytes
    wanted = list(head.output_names) or [item.name for item in found.signature.outputs]
    response = link_pb2.ResponseHead(outputs=[outputs[name][0] for name in wanted], parameters=head.parameters)
    timing = link_pb2.Timing(
        queue_us=11, group_us=70, wait_us=7, step_us=50, prepare_us=5, batch_rows=head.rows, batch_requests=1, is_first_in_batch=True,
        num_attempts=1, group="group-1",
    )
    reply = link_pb2.ReplyHead(response=response.SerializeToString(), revision=head.revision, timing=timing)
    return reply.SerializeToString(), tuple(outputs[name][1] for name in wanted)


def answer(exchange: Exchange, head: link_pb2.RequestHead) -> None:
    exchange.reply(*echo_reply(head, exchange.payload))


Script = Callable[[Exchange, link_pb2.RequestHead], None]


@dataclass(slots=True)
class ScriptedOrchestrator:
    """Speaks the real link; what it does with a request is `script`."""

    id: str
    script: Script = answer
    heads: list[link_pb2.RequestHead] = field(default_factory=list)
    num_cancelled: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    links: LinkServer | None = None
    server: Server | None = None
    lease: Lease | None = None

    def on_exchange(self, exchange: Exchange) -> None:
        head = link_pb2.RequestHead.FromString(exchange.head)
        self.heads.append(head)
        exchange.on_cancel(self._on_cancel)
        self.arrived.set()
        self.script(exchange, head)

    async def start(self, registry: DirectoryRegistry, implementation: str, endpoint: str = "127.0.0.1:0") -> None:
        self.server = create_server(ServerOptions(endpoint, implementation))
        self.links = LinkServer(self.on_exchange)
        self.links.attach(self.server)
        bound = await self.server.start()
        self.lease = await registry.register(Registration(ORCHESTRATOR, self.id, bound))

    async def stop(self) -> None:
        """Gone at once, like a process that dies."""
        if self.lease is not None:
            await self.lease.release()
            self.lease = None
        if self.server is not None:
            await self.server.stop(0.0)
            self.server = None

    def _on_cancel(self) -> None:
        self.num_cancelled += 1
        self.cancelled.set()


@dataclass(slots=True)
class Mesh:
    """What a test holds."""

    endpoint: str
    gateway: Gateway
    context: ServiceContext
    registry: DirectoryRegistry
    orchestrators: list[ScriptedOrchestrator]
    #: Every reason given to set_readiness, in order.
    readiness: list[str | None]

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Returns once `is_true`; the test's own timeout ends a wait in vain."""
        while not is_true():
            await asyncio.sleep(0.01)

    @property
    def is_ready(self) -> bool:
        return self.context.readiness is None

    async def serve(self, item: RevisionSpec, *, replicas: int = 1, is_live: bool = True) -> Lease | None:
        """Publishes, wants, and (unless told otherwise) registers a group of one revision."""
        await publish(self.registry, item)
        await want(self.registry, item, replicas)
        return await register_group(self.registry, item) if is_live else None


async def publish(registry: DirectoryRegistry, item: RevisionSpec) -> None:
    await registry.write(revision_key(item.model, item.revision), encode_revision(item))


async def want(registry: DirectoryRegistry, item: RevisionSpec, replicas: int = 1) -> None:
    document = {"model": item.model, "revision": item.revision, "replicas": replicas}
    await registry.write(f"{DESIRED}{item.model}", json.dumps(document).encode())


async def register_group(registry: DirectoryRegistry, item: RevisionSpec) -> Lease:
    metadata = {"model": item.model, "revision": item.revision, "epoch": "1", "node": "node-1", "max_rows": "8"}
    return await registry.register(Registration(GROUP, f"{item.model}-{item.revision[:8]}", "127.0.0.1:1", metadata))


@asynccontextmanager
async def running_mesh(
    root: Path,
    *,
    implementation: str = "completion-queue",
    scripts: tuple[Script, ...] = (answer,),
    settings: dict[str, object] | None = None,
    specs: tuple[RevisionSpec, ...] = SPECS,
) -> AsyncIterator[Mesh]:
    """A ready mesh: every model of `specs` with one live group, one orchestrator a script, and the gateway under test."""
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(DirectoryRegistry(root / "registry"))
        for item in specs:
            await publish(registry, item)
            await want(registry, item)
            await register_group(registry, item)
        orchestrators = [ScriptedOrchestrator(f"orchestrator-{index}", script) for index, script in enumerate(scripts)]
        for orchestrator in orchestrators:
            stack.push_async_callback(orchestrator.stop)
            await orchestrator.start(registry, implementation)
        started: asyncio.Future[Mesh] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            async with asyncio.TaskGroup() as tasks:
                started.set_result(await _start_gateway(registry, tasks, implementation, orchestrators, settings or {}))
                await asyncio.Event().wait()

        runner = asyncio.create_task(run())
        await asyncio.wait({runner, started}, return_when=asyncio.FIRST_COMPLETED)
        mesh = started.result() if started.done() else await runner
        assert mesh is not None
        try:
            if orchestrators and specs:
                await mesh.until(lambda: mesh.is_ready and _num_models(mesh) == len(specs) and _num_links(mesh) == len(orchestrators))
            yield mesh
        finally:
            await mesh.context.server.stop(0.0)
            await mesh.gateway.stop()
            runner.cancel()
            with suppress(asyncio.CancelledError):
                await runner


async def _start_gateway(
    registry: DirectoryRegistry, tasks: asyncio.TaskGroup, implementation: str, orchestrators: list[ScriptedOrchestrator],
    overrides: dict[str, object],
) -> Mesh:
    gateway = Gateway(GatewaySettings(**overrides))  # type: ignore[arg-type]
    server = gateway.guard(create_server(ServerOptions("127.0.0.1:0", implementation)))
    health = HealthService(("", *gateway.reflected))
    health.attach(server)
    add_reflection(server, gateway.reflected)
    readiness: list[str | None] = []

    def on_readiness(reason: str | None) -> None:
        readiness.append(reason)
        for name in ("", *gateway.reflected):
            health.set(name, reason is None)

    context = ServiceContext("gateway", "gateway-test", server, registry, tasks, CollectorRegistry(), on_readiness)
    await gateway.start(context)
    endpoint = await server.start()
    return Mesh(endpoint, gateway, context, registry, orchestrators, readiness)


def _num_models(mesh: Mesh) -> int:
    catalog = mesh.gateway._catalog
    return 0 if catalog is None else sum(model.serving.num_ready_replicas > 0 for model in catalog.models.values())


def _num_links(mesh: Mesh) -> int:
    upstream = mesh.gateway._upstream
    return 0 if upstream is None else sum(orchestrator.can_take for orchestrator in upstream._orchestrators.values())

