"""`tensorway top`: the mesh, live on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tensorway.cli.top_look import MeshReader

_EVERY_S: Final = 1.0


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of one second, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    every: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between two looks.")] = _EVERY_S,
    endpoint: Annotated[str, typer.Option(envvar="TENSORWAY_ENDPOINT", help="A gateway.")] = "localhost:8001",
) -> None:
    """Watch gateways, orchestrators, nodes, groups and models live: rates, times, queues, memory, errors. q quits, s changes the order.

    Examples: `tensorway top` · `tensorway top --once` · `tensorway top --json`
    """
    import asyncio

    from rich.console import Console

    asyncio.run(_run(endpoint, every, Console(), is_once=once or as_json, as_json=as_json))


async def _run(endpoint: str, every_s: float, console: Console, *, is_once: bool, as_json: bool) -> None:
    import asyncio
    import json
    from dataclasses import asdict

    import aiohttp

    from tensorway.cli.connection import connect_async, given
    from tensorway.cli.top_frame import frame_of
    from tensorway.cli.top_look import MeshReader, ops_tls
    from tensorway.cli.top_view import screen

    async with connect_async(endpoint) as client, aiohttp.ClientSession() as session:
        reader = MeshReader(client, session, ops_tls(given()))
        if not is_once:
            await _watch(reader, every_s, console)
            return
        before = await reader.look()
        await asyncio.sleep(every_s)
        frame = frame_of(await reader.look(), before)
        if as_json:
            print(json.dumps(asdict(frame)))
        else:
            console.print(screen(frame, console))


async def _watch(reader: MeshReader, every_s: float, console: Console) -> None:
    """Shows frame after frame until q or Ctrl-C. A gateway that does not answer for a while leaves the last frame standing."""
    import asyncio

    from rich.live import Live

    from tensorway.cli.top_frame import frame_of
    from tensorway.cli.top_keys import Keys
    from tensorway.cli.top_view import ORDERS, screen
    from tensorway.errors import TensorwayError

    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        before = await reader.look()
        frame, problem = frame_of(before, before), ""
        while not keys.is_over.is_set():
            live.update(screen(frame, console, ORDERS[keys.num_orders % len(ORDERS)], problem), refresh=True)
            keys.is_pressed.clear()
            try:
                async with asyncio.timeout(every_s):
                    await keys.is_pressed.wait()
                continue
            except TimeoutError:
                pass
            try:
                now = await reader.look()
            except TensorwayError as error:
                problem = f"what is shown is old: {error}"
            else:
                frame, before, problem = frame_of(now, before), now, ""
