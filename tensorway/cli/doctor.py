"""`tensorway doctor`: is everything as it should be, and if not, what to do."""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tensorway.config import default_registry
from tensorway.errors import TensorwayError
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR, Registration

if TYPE_CHECKING:
    from tensorway.results import ModelDescription

_NEEDED: Final = ("tensorway", "grpcio", "protobuf", "pydantic", "uvloop")
_FOR_WORKERS: Final = ("torch", "transformers", "safetensors")
_TIMEOUT_S: Final = 3.0
#: Kinds that a mesh needs at least one of, and what starts one.
_STARTED_BY: Final = {
    GATEWAY: "start one: tensorway gateway (or everything at once: tensorway up MODELS_DIR)",
    ORCHESTRATOR: "start one: tensorway orchestrator",
    NODE: "start one: tensorway worker --models-dir MODELS_DIR",
    GROUP: "look at `tensorway models` for the reason, and at the worker's log",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    is_good: bool
    fact: str
    #: What to do; empty where all is well.
    remedy: str = ""


def doctor(
    registry: Annotated[
        str, typer.Option(envvar="TENSORWAY_REGISTRY", help="The mesh's registry; default: the one of `tensorway up`.")
    ] = "",
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="A gateway; default: those in the registry.")] = "",
) -> None:
    """Check the installation, the registry, every service and every model. Exit status 1 if something is wrong.

    Examples: `tensorway doctor` · `tensorway doctor --registry directory:/run/tensorway` · `tensorway doctor --endpoint host:8001`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = [*check_installation(), *asyncio.run(check_mesh(registry or default_registry(), endpoint))]
    table = Table()
    for column in ("", "what", "finding", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = Text("ok", style="green") if finding.is_good else Text("BAD", style="bold red")
        table.add_row(mark, Text(finding.subject), Text(finding.fact), Text(finding.remedy))
    Console().print(table)
    if not all(finding.is_good for finding in findings):
        raise typer.Exit(1)


def check_installation() -> Iterator[Finding]:
    """Versions of Python and of the packages that matter."""
    is_new_enough = sys.version_info >= (3, 11)
    yield Finding("python", is_new_enough, platform.python_version(), "" if is_new_enough else "install Python 3.11 or newer")
    for package in _NEEDED:
        version = _version(package)
        yield Finding(package, version is not None, version or "is not installed", "" if version else "pip install tensorway")
    for package in _FOR_WORKERS:
        # A machine that runs no worker needs none of these.
        yield Finding(package, True, _version(package) or "is not installed; only workers need it: pip install 'tensorway[worker]'")


async def check_mesh(registry_url: str, endpoint: str) -> list[Finding]:
    """The registry, the health of all that is registered there, and the models as a gateway tells them."""
    from tensorway.registry import open_registry

    members: dict[str, tuple[Registration, ...]] = {}
    findings: list[Finding] = []
    try:
        registry = open_registry(registry_url)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                members = {kind: await registry.registrations(kind) for kind in _STARTED_BY}
        finally:
            await registry.close()
    except (TensorwayError, TimeoutError) as error:
        problem = f"{registry_url}: {str(error) or 'did not answer'}"
        findings.append(Finding("registry", False, problem, "give the mesh's own with --registry"))
    else:
        findings.append(Finding("registry", True, registry_url))
        findings += await _check_members(members)
    gateways = [endpoint] if endpoint else [gateway.endpoint for gateway in members.get(GATEWAY, ())]
    for gateway in gateways:
        findings += await _check_models(gateway)
    return findings


async def _check_members(members: dict[str, tuple[Registration, ...]]) -> list[Finding]:
    missing = [Finding(kind, False, "none is registered", _STARTED_BY[kind]) for kind, found in members.items() if not found]
    async with asyncio.TaskGroup() as tasks:
        checks = [tasks.create_task(_check_member(member)) for found in members.values() for member in found]
    return [*missing, *(check.result() for check in checks)]


async def _check_member(member: Registration) -> Finding:
    from tensorway.cli.connection import given
    from tensorway.transport import check_health

    subject = f"{member.kind} {member.id}"
    try:
        status = await check_health(member.endpoint, "", _TIMEOUT_S, given().member_tls(member.kind))
    except TensorwayError as error:
        return Finding(subject, False, f"{member.endpoint}: {error}", "is the process alive, and can this machine reach its endpoint?")
    if status == "SERVING":
        return Finding(subject, True, f"{member.endpoint} serves")
    where = f"http://{member.metadata['ops']}/readyz" if "ops" in member.metadata else "its log"
    return Finding(subject, False, f"{member.endpoint} says {status}", f"{where} says why")


async def _check_models(endpoint: str) -> list[Finding]:
    from tensorway.cli.connection import connect_async

    async with connect_async(endpoint, timeout_s=_TIMEOUT_S, retries=0) as client:
        try:
            models = await client.models()
        except TensorwayError as error:
            return [Finding(f"gateway {endpoint}", False, str(error), "is the endpoint right, and the gateway running?")]
    if not models:
        return [Finding(f"models at {endpoint}", False, "none is served", "start a worker with --models-dir MODELS_DIR")]
    return [_judge(model) for model in models]


def _judge(model: ModelDescription) -> Finding:
    replicas = f"{model.num_ready_replicas} of {model.num_replicas} replicas serve"
    if model.is_dormant:
        return Finding(f"model {model.name}", True, model.reason)
    if not model.is_ready:
        remedy = "wait for it" if model.state == "loading" else "mend what the reason names; the node tries again by itself"
        return Finding(f"model {model.name}", False, f"{model.state}: {model.reason}", remedy)
    if model.num_ready_replicas < model.num_replicas:
        return Finding(f"model {model.name}", False, replicas, "wait for the others, or start another worker with free devices")
    return Finding(f"model {model.name}", True, replicas)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
