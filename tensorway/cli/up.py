"""`tensorway up`: fetch, start, wait with progress, optionally show real answers, serve until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import sys
import sysconfig
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tensorway.cli.fetching import fetch_with_progress
from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tensorway.config import default_run_dir
from tensorway.errors import FailedPrecondition, TensorwayError, Unavailable
from tensorway.model_directory import ModelDirectory, find_directories
from tensorway.registry import open_registry
from tensorway.registry.port import NODES, ORCHESTRATOR, Registry
from tensorway.transport import check_health

INFER: Final = "tensorway.v1.InferenceService/Infer"
_START_TIMEOUT_S: Final = 300.0
#: Words for a person; the node's states otherwise.
_STATE_WORDS: Final = {"starting": "starting", "loading": "loading", "warming": "warming up", "ready": "ready", "backing_off": "failed"}


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The command's arguments and options."""

    models_dir: str
    models: tuple[str, ...]
    listen: str
    ops_listen: str
    run_dir: str
    demo: bool
    exit_after_demo: bool


def run_up(options: UpOptions) -> int:
    """Returns the exit status: 0 after Ctrl-C, 1 where something could not be started or ended on its own."""
    console = Console(stderr=True)
    try:
        return asyncio.run(_up(options, console))
    except TensorwayError as error:
        console.print("tensorway up:", str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


async def _up(options: UpOptions, console: Console) -> int:
    directories = _chosen(options)
    _check_port_free(options.listen, "--listen")
    _check_port_free(options.ops_listen, "--ops-listen")
    fetch_with_progress(directories, console)
    run_dir = Path(options.run_dir or default_run_dir()).absolute()
    registry_url = f"directory:{run_dir / 'registry'}"
    await _refuse_second_mesh(registry_url)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with LocalMesh(run_dir / "logs") as mesh:
        await mesh.start(_plans(options, registry_url))
        status = await _first(_serve(options, directories, registry_url, console), mesh.watch(), stop.wait())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)  # a second Ctrl-C interrupts the stopping
        console.print("stopping…")
    console.print("stopped.")
    return status


async def _serve(options: UpOptions, directories: tuple[ModelDirectory, ...], registry_url: str, console: Console) -> None:
    async with asyncio.timeout(_START_TIMEOUT_S):
        await _wait_ready(options, directories, registry_url, console)
    if options.demo:
        from tensorway.cli.demo import show_demo

        await show_demo(options.listen, {directory.yaml.name: directory for directory in directories}, console)
    if not options.exit_after_demo:
        _print_how_to(options, [directory.yaml.name for directory in directories], console)
        await asyncio.Event().wait()


async def _first(*coroutines: Awaitable[object]) -> int:
    """Runs all until the first ends; its error is raised, and the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return 0


def _chosen(options: UpOptions) -> tuple[ModelDirectory, ...]:
    directories = find_directories(Path(options.models_dir))
    names = {directory.yaml.name for directory in directories}
    unknown = set(options.models) - names
    if unknown:
        raise FailedPrecondition(f"--model {', '.join(sorted(unknown))}: not in {options.models_dir}; there are {', '.join(sorted(names))}")
    chosen = tuple(directory for directory in directories if not options.models or directory.yaml.name in options.models)
    if not chosen:
        raise FailedPrecondition(f"{options.models_dir}: holds no model directory (one with a model.yaml)")
    return chosen


def _check_port_free(endpoint: str, flag: str) -> None:
    if endpoint.startswith("unix:") or endpoint == "off":
        return
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except (OSError, ValueError) as error:
            raise Unavailable(f"{flag} {endpoint} cannot be bound ({error}); choose another endpoint", field=flag) from error


async def _refuse_second_mesh(registry_url: str) -> None:
    registry = open_registry(registry_url)
    if await registry.registrations(ORCHESTRATOR):
        raise FailedPrecondition(f"a mesh already runs on {registry_url}; stop it, or give this one its own --run-dir")
    # What an earlier run wanted must not be wanted of this one.
    async for documents in registry.watch_documents(""):
        for key in documents:
            await registry.delete(key)
        break


def _plans(options: UpOptions, registry_url: str) -> list[MemberPlan]:
    shared = {"registry": registry_url, "log_format": "text"}
    models = {"models": json.dumps(options.models)} if options.models else {}
    gateway = {**shared, "listen": options.listen, "ops_listen": options.ops_listen}
    free = {**shared, "listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0"}
    node = {**free, "models_dir": str(Path(options.models_dir).absolute()), **models, "spread_wait_s": 0.0}
    return [
        MemberPlan("gateway", "gateway", flags_of(gateway)),
        MemberPlan("orchestrator", "orchestrator", flags_of(free)),
        MemberPlan("node", "node", flags_of(node)),
    ]


async def _wait_ready(options: UpOptions, directories: tuple[ModelDirectory, ...], registry_url: str, console: Console) -> None:
    """Shows each model's way to ready; returns when the gateway is ready too. Raises Unavailable where a group keeps failing."""
    registry = open_registry(registry_url)
    name, state = TextColumn("{task.description:<20}"), TextColumn("{task.fields[state]}")
    columns = (SpinnerColumn(), name, BarColumn(20), state, TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        # One that begins without a replica has none to wait for.
        starting = [directory.yaml.name for directory in directories if directory.yaml.replicas]
        tasks = {model: progress.add_task(model, total=1.0, state="waiting") for model in starting}
        await _follow_groups(registry, tasks, progress)
        for task in tasks.values():
            progress.update(task, completed=1.0, state="ready")
    await _wait_gateway(options.listen)


async def _follow_groups(registry: Registry, tasks: dict[str, TaskID], progress: Progress) -> None:
    # A replica that has served may end again while others still start, where its model scales to zero.
    ready: set[str] = set()
    async for documents in registry.watch_documents(NODES):
        for document in documents.values():
            for group in json.loads(document).get("groups", ()):
                model, state = group["model"], group["state"]
                if model not in tasks:
                    continue
                if state == "ready":
                    ready.add(model)
                if state == "backing_off" and group["epoch"] >= 3:
                    raise Unavailable(f"model {model!r} does not start: {group['reason']}")
                shown = f"{_STATE_WORDS.get(state, state)} {group['detail']}".strip()
                progress.update(tasks[model], completed=max(0.0, group["fraction"]) if state != "ready" else 1.0, state=shown)
        if ready >= tasks.keys():
            return


async def _wait_gateway(endpoint: str) -> None:
    """Returns once the gateway says SERVING: it has found the orchestrator."""
    problem: object = None
    for attempt in range(100):
        try:
            if await check_health(endpoint, "", 2.0) == "SERVING":
                return
        except TensorwayError as error:
            problem = error
        await asyncio.sleep(min(0.5, 0.02 * (attempt + 1)))
    raise Unavailable(f"the gateway at {endpoint} is not ready: {problem or 'it says NOT_SERVING'}")


def _print_how_to(options: UpOptions, models: Collection[str], console: Console) -> None:
    endpoint = options.listen
    console.print(f"\nServing on [bold]{endpoint}[/] (gRPC) and http://{options.ops_listen} (ops). Ctrl-C stops it. Try:\n", soft_wrap=True)
    lines = [f"grpcurl -plaintext {endpoint} list", f"grpcurl -plaintext {endpoint} tensorway.v1.ModelService/ListModels"]
    if "minilm" in models:
        tensor = '{"name":"text","dtype":"DATA_TYPE_BYTES","shape":[1],"data":"AgAAAGhp"}'
        lines += [
            f"""grpcurl -plaintext -d '{{"model":"minilm","inputs":[{tensor}]}}' {endpoint} {INFER}""",
            f'tensorway infer minilm --text "hello" --endpoint {endpoint}',
        ]
        call = """infer("minilm", {"text": ["hello"]})["embedding"].shape"""
    else:
        call = "models()"
    lines += [
        f"tensorway models list --endpoint {endpoint}",
        f"python -c 'import tensorway; print(tensorway.Client(\"{endpoint}\").{call})'",
    ]
    prefix = _scripts_prefix()
    print("\n".join(f"  {prefix}{line}" for line in lines) + "\n", file=sys.stdout, flush=True)


def _scripts_prefix() -> str:
    """What must stand before a command of this environment so that it can be pasted: nothing where the environment is activated."""
    scripts = Path(sysconfig.get_path("scripts"))
    if shutil.which("tensorway") == str(scripts / "tensorway"):
        return ""
    return f"{scripts.relative_to(Path.cwd()) if scripts.is_relative_to(Path.cwd()) else scripts}/"
