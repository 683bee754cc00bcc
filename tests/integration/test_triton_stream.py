"""tritonclient's streams, in its own process, through a real gateway to an orchestrator that answers by script."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.contract.gateway.scripted import running_mesh
from tests.contract.gateway.streaming import TALKER, talk

ROOT = Path(__file__).parents[2]
TRITON_PYTHON = ROOT / ".venv-triton" / "bin" / "python"
CHATTY = replace(TALKER, model="smollm2-chat")


@pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
async def test_tritonclient_reads_a_generation_piece_by_piece(tmp_path: Path, implementation: str) -> None:
    async with running_mesh(tmp_path, implementation=implementation, scripts=(talk(12),), specs=(CHATTY,)) as mesh:
        script = ROOT / "tests" / "integration" / "triton_stream_script.py"
        process = await asyncio.create_subprocess_exec(
            TRITON_PYTHON, script, mesh.endpoint, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 0, output.decode()
        assert output.decode().endswith("all good\n")
