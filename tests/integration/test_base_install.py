"""The base distribution alone, without torch and numpy, starts a gateway and an orchestrator that find each other."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import GATEWAY, ORCHESTRATOR
from tensorway.transport import check_health
from tests.integration.conftest import ROOT

PYTHON = ROOT / ".venv-base" / "bin" / "python"


def test_the_base_environment_has_neither_torch_nor_numpy() -> None:
    for module in ("torch", "numpy", "transformers"):
        assert subprocess.run([PYTHON, "-c", f"import {module}"], stderr=subprocess.DEVNULL, check=False).returncode == 1


def test_importing_the_kit_imports_nothing_heavy() -> None:
    code = "import sys, tensorway, tensorway.client, tensorway.service, tensorway.cli.app; print(sorted(sys.modules))"
    loaded = subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "'torch'" not in loaded
    assert "'numpy'" not in loaded


async def test_gateway_and_orchestrator_serve_without_torch(tmp_path: Path) -> None:
    flags = [f"--registry=directory:{tmp_path}", "--listen=127.0.0.1:0", "--ops-listen=off"]
    processes = [
        await asyncio.create_subprocess_exec(str(PYTHON), "-m", module, *flags, cwd=tmp_path)
        for module in ("tensorway_gateway", "tensorway_orchestrator")
    ]
    try:
        async with asyncio.timeout(30), DirectoryRegistry(tmp_path) as registry:
            async for found in registry.watch(ORCHESTRATOR):
                if found:
                    break
            async for found in registry.watch(GATEWAY):
                if found:
                    break
            while await check_health(found[0].endpoint, "", 5.0) != "SERVING":
                await asyncio.sleep(0.05)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [await process.wait() for process in processes] == [0, 0]
