"""The `tensorway` command. Each sub-command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from tensorway.errors import TensorwayError
from tensorway.process import MALLOC_SETTINGS

app = typer.Typer(
    name="tensorway",
    help="A gRPC-first inference mesh for PyTorch. Start with `tensorway up MODELS_DIR`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _become(module: str, argv: list[str]) -> NoReturn:
    """Replaces this process by a service, so that signals reach it and malloc's settings are read at its start."""
    os.execve(sys.executable, [sys.executable, "-m", module, *argv], {**MALLOC_SETTINGS, **os.environ})


@app.command(context_settings=_PASS_ON)
def gateway(context: typer.Context) -> None:
    """Start one gateway (`tensorway gateway --help` lists its settings)."""
    _become("tensorway_gateway", context.args)


@app.command(context_settings=_PASS_ON)
def orchestrator(context: typer.Context) -> None:
    """Start one orchestrator (`tensorway orchestrator --help` lists its settings)."""
    _become("tensorway_orchestrator", context.args)


@app.command(context_settings=_PASS_ON)
def worker(context: typer.Context) -> None:
    """Start one worker node (`tensorway worker --help` lists its settings)."""
    _become("tensorway_worker", context.args)


@app.command()
def up(
    models_dir: Annotated[str, typer.Argument(help="Directory that holds your model directories.")] = "models",
    models: Annotated[list[str] | None, typer.Option("--model", help="Serve only this model; repeat for several.")] = None,
    listen: Annotated[str, typer.Option(help="Where the gateway answers gRPC.")] = "127.0.0.1:8001",
    ops_listen: Annotated[str, typer.Option(help="Where the gateway answers /healthz, /readyz and /metrics.")] = "127.0.0.1:8002",
    run_dir: Annotated[str, typer.Option(help="Registry and logs; default: your runtime directory.")] = "",
    demo: Annotated[bool, typer.Option("--demo", help="Once ready, run real requests through the mesh and show the answers.")] = False,
    exit_after_demo: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Fetch what the models need, start a whole mesh on this machine, and serve until Ctrl-C.

    Example: `tensorway up models --model minilm --demo`
    """
    from tensorway.cli.up import UpOptions, run_up

    options = UpOptions(models_dir, tuple(models or ()), listen, ops_listen, run_dir, demo, exit_after_demo)
    raise typer.Exit(run_up(options))


def _register_commands() -> None:
    from tensorway.cli.adapt import adapt
    from tensorway.cli.certs import certs_app
    from tensorway.cli.connection import take
    from tensorway.cli.doctor import doctor
    from tensorway.cli.explain import explain
    from tensorway.cli.generate import generate
    from tensorway.cli.infer import infer
    from tensorway.cli.keys import keys_app
    from tensorway.cli.logs import logs_app
    from tensorway.cli.models import models_app
    from tensorway.cli.plan import plan
    from tensorway.cli.profile import profile
    from tensorway.cli.top import top

    app.callback()(take)
    app.command()(infer)
    app.command()(generate)
    app.command()(explain)
    app.command()(doctor)
    app.command()(plan)
    app.command()(profile)
    app.command()(top)
    app.command()(adapt)
    app.add_typer(models_app, name="models")
    app.add_typer(logs_app, name="logs")
    app.add_typer(certs_app, name="certs")
    app.add_typer(keys_app, name="keys")


def _hint(error: TensorwayError) -> str:
    """What a server that speaks TLS does to a caller in the clear tells nobody why: it hangs up."""
    from tensorway.cli.connection import given

    if "Socket closed" in error.message and given().tls() is False:
        return "; if it speaks TLS, trust its authority: tensorway --tls-ca FILE …"
    return ""


def main() -> None:
    """Entry point: errors of the mesh are one clear sentence, not a traceback."""
    _register_commands()
    try:
        app()
    except TensorwayError as error:
        print(f"tensorway: {error}{_hint(error)}", file=sys.stderr)
        raise SystemExit(1) from None
