"""Prometheus and promtool for tests: `PROMETHEUS_BIN`, `prometheus` on PATH, or Debian's package unpacked into .tools.

`python -m tests.deploy.prometheus` prints the path of the binary, and brings it first where there is none.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.debian import unpack

_TARGET: Final = Path(__file__).resolve().parents[2] / ".tools" / "prometheus"
_SUITE: Final = "bookworm"
#: So soon a test sees what it has done.
SCRAPE_EVERY_S: Final = 0.5


def find_prometheus() -> Path | None:
    """The binary that is there already, with promtool beside it; or None. Raises FileNotFoundError where `PROMETHEUS_BIN` names no file."""
    if named := os.environ.get("PROMETHEUS_BIN"):
        if not Path(named).is_file():
            raise FileNotFoundError(f"PROMETHEUS_BIN is {named!r}, where no file is")
        return Path(named)
    found = shutil.which("prometheus")
    if found and Path(found).with_name("promtool").is_file():
        return Path(found)
    unpacked = _TARGET / "usr" / "bin" / "prometheus"
    return unpacked if unpacked.is_file() else None


def bring_prometheus() -> Path:
    """The binary, fetched from Debian's mirror where it is not there. Several processes may ask at once."""
    found = find_prometheus()
    if found is not None:
        return found
    _TARGET.parent.mkdir(parents=True, exist_ok=True)
    with (_TARGET.parent / "prometheus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if find_prometheus() is None:
            # Unpacked beside its place and moved there in one step: an interrupted download is never taken for a binary.
            fresh = _TARGET.with_name("prometheus.fresh")
            shutil.rmtree(fresh, ignore_errors=True)
            unpack(_SUITE, ("prometheus",), fresh)
            shutil.rmtree(fresh / "apt")
            shutil.rmtree(_TARGET, ignore_errors=True)
            fresh.rename(_TARGET)
    found = find_prometheus()
    assert found is not None, "the package holds no usr/bin/prometheus"
    return found


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs promtool; what it says goes to stdout."""
    binary = bring_prometheus().with_name("promtool")
    return subprocess.run([binary, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query finds. Raises AssertionError with Prometheus' own words where the expression cannot be run."""
        answer = await self._get("/api/v1/query", query=expression)
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        result = answer["data"]["result"]
        return result if answer["data"]["resultType"] in ("vector", "matrix") else [{"metric": {}, "value": result}]

    async def targets(self) -> list[dict[str, Any]]:
        """Everything that is scraped."""
        found: list[dict[str, Any]] = (await self._get("/api/v1/targets"))["data"]["activeTargets"]
        return found

    async def rules(self) -> list[dict[str, Any]]:
        """All rules, with their health."""
        groups = (await self._get("/api/v1/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def wait(self, expression: str, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """What the query finds, once it finds anything."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := await self.query(expression)):
                    await asyncio.sleep(SCRAPE_EVERY_S / 2)
        except TimeoutError:
            raise AssertionError(f"{expression} found nothing within {timeout_s:.0f} s") from None
        return found

    async def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        def fetch() -> dict[str, Any]:
            try:
                with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as response:
                    answer: dict[str, Any] = json.load(response)
            except urllib.error.HTTPError as error:
                answer = json.load(error)
            return answer

        return await asyncio.to_thread(fetch)


@asynccontextmanager
async def running_prometheus(folder: Path, config: Path) -> AsyncIterator[Prometheus]:
    """A ready Prometheus on `config`, with its data in `folder`."""
    binary = bring_prometheus()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    log = (folder / "prometheus.log").open("wb")
    arguments: Sequence[str] = (
        f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={endpoint}", "--log.level=warn",
    )
    process = await asyncio.create_subprocess_exec(binary, *arguments, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(30):
            while not await asyncio.to_thread(_is_ready, endpoint):
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                await asyncio.sleep(0.05)
        yield Prometheus(f"http://{endpoint}")
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        log.close()


def _is_ready(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{endpoint}/-/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def main() -> int:
    """Prints the path, or one line that says what to do; returns the exit status."""
    try:
        print(bring_prometheus())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"prometheus: cannot be brought from Debian's mirror ({error}); set PROMETHEUS_BIN", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
