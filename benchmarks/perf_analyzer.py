"""NVIDIA's perf-analyzer against the gateway's OIP v2 dialect.

Its wheel wants a newer glibc than Debian 12 has: the wheel's binary is started through Debian 13's own loader, unpacked into .tools.
"""

from __future__ import annotations

import asyncio
import csv
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.debian import unpack
from benchmarks.h2load import LoadFailed

TOOLS = Path(__file__).parent.parent / ".tools"
VERSION = "2.60.0"


@dataclass(frozen=True, slots=True)
class Analyzed:
    """One line of its report."""

    concurrency: int
    inferences_per_s: float
    p50_ms: float
    p99_ms: float


def install() -> list[str]:
    """The command that starts it; the first call fetches the wheel and the loader."""
    libraries = TOOLS / "glibc" / "usr" / "lib" / "x86_64-linux-gnu"
    if not libraries.is_dir():
        unpack("trixie", ("libc6", "libstdc++6", "libgcc-s1"), TOOLS / "glibc")
    folder = TOOLS / "perf-analyzer"
    binary = folder / "perf_analyzer" / "bin" / "perf_analyzer"
    if not binary.is_file():
        platform = ["--platform", "manylinux_2_38_x86_64", "--only-binary", ":all:", "--no-deps"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *platform, "--dest", str(folder), f"perf-analyzer=={VERSION}"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        binary.chmod(0o755)
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(binary)]


async def measure(endpoint: str, model: str, concurrency: int, quick: bool) -> Analyzed:
    """Its own measurement of 4 KiB identity requests, until its windows agree (or three have passed)."""
    command = await asyncio.to_thread(install)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        arguments = [
            *command, "-m", model, "-i", "grpc", "-u", endpoint, "--shape", "input:1024", "--concurrency-range", str(concurrency),
            "-p", "1000" if quick else "3000", "-r", "4", "-s", "30", "-f", str(report),
        ]
        process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        output = (await process.communicate())[0].decode()
        if not report.is_file():
            raise LoadFailed(f"perf-analyzer failed: {output[-2000:]}")
        with report.open() as file:
            row = next(csv.DictReader(file))
    return Analyzed(concurrency, float(row["Inferences/Second"]), float(row["p50 latency"]) / 1e3, float(row["p99 latency"]) / 1e3)
