"""Load from h2load (nghttp2's C load generator, Debian's nghttp2-client): a prepared gRPC message as the body of an HTTP/2 POST.

h2load counts every HTTP 200 as a success, and gRPC errors are HTTP 200 too: so each run checks that the bytes received are exactly those of
as many right answers.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu import CpuClock

INFER = "/tensorway.v1.InferenceService/Infer"


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` requests in flight, over `connections` HTTP/2 connections."""

    concurrency: int
    num_requests: int

    @property
    def connections(self) -> int:
        """As clients in the field do: a few connections carry many streams."""
        return max(1, min(8, self.concurrency // 8))


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. CPU is in microseconds per request, by service."""

    load: Load
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]

    @property
    def cpu_total_us(self) -> float:
        return sum(self.cpu_us.values())


class LoadFailed(Exception):
    """The run is worth nothing; the text says why."""


def require_h2load() -> str:
    path = shutil.which("h2load")
    if path is None:
        raise LoadFailed("h2load is not installed: apt-get install nghttp2-client")
    return path


async def drive(endpoint: str, message: bytes, response_bytes: int, load: Load, cpu: CpuClock) -> Measured:
    """Sends `load.num_requests` times `message` and checks that each answer had `response_bytes` (gRPC prefix included)."""
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(struct.pack(">BI", 0, len(message)) + message)
        arguments = [
            require_h2load(), "-n", str(load.num_requests), "-c", str(load.connections),
            "-m", str(max(1, load.concurrency // load.connections)), "-t", "1", "-d", str(body), "--log-file", str(log), "-w", "24",
            "-W", "26", "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{endpoint}{INFER}",
        ]
        before = cpu.read()
        process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        output = (await process.communicate())[0].decode()
        after = cpu.read()
        if process.returncode:
            raise LoadFailed(output[-2000:])
        _check(output, load, response_bytes)
        times_ms = sorted(int(line.split()[2]) / 1e3 for line in log.read_text().splitlines())
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", output)
    if rate is None:
        raise LoadFailed(output[-2000:])
    return Measured(
        load, float(rate[1]), times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.99)],
        {service: (after[service] - before[service]) / 1e3 / load.num_requests for service in before},
    )


def _check(output: str, load: Load, response_bytes: int) -> None:
    succeeded = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", output)
    received = re.search(r"\((\d+)\) data", output)
    if succeeded is None or received is None:
        raise LoadFailed(output[-2000:])
    if int(succeeded[1]) != load.num_requests:
        raise LoadFailed(f"only {succeeded[1]} of {load.num_requests} requests succeeded")
    if int(received[1]) != load.num_requests * response_bytes:
        raise LoadFailed(f"{received[1]} bytes of answers, expected {load.num_requests} x {response_bytes}: some were gRPC errors")
