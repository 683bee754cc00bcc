"""The containers as they are shipped, on a real engine: `make compose-test`. The file itself is checked by every run of the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tensorway.config import ENV_PREFIX
from tensorway_gateway.settings import GatewaySettings
from tensorway_orchestrator.settings import OrchestratorSettings
from tensorway_worker.settings import NodeSettings
from tests.deploy.engine import ROOT, SERVICES, Engine, NoEngine, make_images, running_engine

COMPOSE = ROOT / "deploy" / "compose.yaml"
SETTINGS = {"gateway": GatewaySettings, "orchestrator": OrchestratorSettings, "worker": NodeSettings}
#: Wheels that only a worker may hold.
HEAVY = {"torch", "numpy", "transformers"}
LARGEST_MB = {"gateway": 400, "orchestrator": 400}
#: Seconds within which the mesh must serve again after a loss.
RECOVERY_S = 40.0

needs_engine = pytest.mark.skipif(not os.environ.get("TENSORWAY_COMPOSE_TEST"), reason="the long form: make compose-test")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return document


def test_every_setting_in_it_exists(compose: dict[str, Any]) -> None:
    for service, settings in SETTINGS.items():
        names = {name.removeprefix(ENV_PREFIX).lower() for name in compose["services"][service]["environment"]}
        assert names <= settings.model_fields.keys(), service


def test_no_service_of_ours_runs_with_more_than_it_needs(compose: dict[str, Any]) -> None:
    for service in SERVICES:
        options = compose["services"][service]
        assert options["read_only"], service
        assert options["cap_drop"] == ["ALL"], service
        assert options["mem_limit"], service
        assert re.search(r"^USER 65532:65532$", (ROOT / "services" / service / "Dockerfile").read_text(), re.MULTILINE), service


def test_only_this_machine_reaches_it(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert compose["networks"]["mesh"]["internal"] is True


def test_what_it_mounts_is_there(compose: dict[str, Any]) -> None:
    mounts = [mount for service in compose["services"].values() for mount in service.get("volumes", ()) if mount.startswith("./")]
    assert [mount for mount in mounts if not (COMPOSE.parent / mount.split(":")[0]).is_dir()] == []


def test_images_install_what_is_pinned() -> None:
    """Every dependency of pyproject.toml has a pin that it allows."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, extra in (("base", []), ("worker", project["optional-dependencies"]["worker"])):
        lines = (ROOT / "deploy" / "requirements" / f"{name}.txt").read_text().splitlines()[1:]
        pins = dict(line.split("==") for line in lines)
        pins = {re.sub(r"[-_.]+", "-", package): version for package, version in pins.items()}
        for text in (*project["dependencies"], *extra):
            wanted = Requirement(text)
            pinned = pins.get(re.sub(r"[-_.]+", "-", wanted.name.lower()))
            assert pinned is not None, f"{name}: {wanted.name} is not pinned; make lock"
            assert wanted.specifier.contains(pinned, prereleases=True), f"{name}: {wanted} is pinned to {pinned}; make lock"
        assert bool(HEAVY & pins.keys()) == (name == "worker")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        with running_engine(tmp_path_factory.mktemp("engine")) as made:
            make_images(made)
            yield made
    except NoEngine as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def mesh(engine: Engine) -> Iterator[Engine]:
    """`docker compose up` with what serves, and a light model."""
    up = ("compose", "-f", str(COMPOSE), "--env-file", "deploy/small.env")
    os.environ["TENSORWAY_MODELS"] = '["identity"]'
    try:
        engine.docker(*up, "up", "--wait", "--wait-timeout", "120", "--no-build", "--pull", "never")
        yield engine
    except BaseException:
        print(engine.docker(*up, "logs", "--tail", "60", check=False))
        raise
    finally:
        engine.docker(*up, "down", "--volumes", "--timeout", "30", check=False)
        del os.environ["TENSORWAY_MODELS"]


_CALL = """
import sys, time, numpy as np
from tensorway import Client
from tensorway.errors import TensorwayError
give_up = time.monotonic() + float(sys.argv[2])
good = bad = 0
with Client(sys.argv[1], timeout_s=10, retries=0) as client:
    while True:
        try:
            row = np.random.rand(2, 3).astype(np.float32)
            assert (client.infer("identity", {"input": row})["output"] == row).all()
            good += 1
        except TensorwayError as error:
            bad += 1
            last = f"{type(error).__name__}: {error}"
            if time.monotonic() > give_up:
                sys.exit(f"{good} answered, {bad} failed, the last with {last}")
            good = 0
            time.sleep(0.2)
        if good == int(sys.argv[3]):
            break
print(f"{good} answered, {bad} failed before")
"""


def call(engine: Engine, endpoint: str, patience_s: float = RECOVERY_S, in_a_row: int = 50) -> str:
    """Returns once so many requests in a row were answered rightly."""
    done = engine.run(sys.executable, "-c", _CALL, endpoint, str(patience_s), str(in_a_row))
    assert done.returncode == 0, done.stderr
    return done.stdout


def containers(engine: Engine, service: str) -> list[str]:
    names = engine.docker("ps", "--filter", f"label=com.docker.compose.service={service}", "--format", "{{.Names}}").split()
    return sorted(names)


@needs_engine
@pytest.mark.timeout(1800)
def test_images_are_small_and_hold_no_more_than_they_need(engine: Engine) -> None:
    sizes = {}
    for service in SERVICES:
        (image,) = json.loads(engine.docker("image", "inspect", f"tensorway/{service}:latest"))
        sizes[service] = image["Size"] / 1e6
        assert image["Config"]["User"] == "65532:65532"
        base = json.loads(engine.docker("image", "inspect", "python:3.11-slim"))[0]["Size"] / 1e6
        print(f"{service}: {sizes[service]:.0f} MB, of which {base:.0f} MB are the base image")
    assert all(sizes[service] < most for service, most in LARGEST_MB.items()), sizes
    for service in ("gateway", "orchestrator"):
        found = engine.docker("run", "--rm", "--entrypoint", "python", f"tensorway/{service}", "-c", "import torch", check=False)
        assert "No module named 'torch'" in found


@needs_engine
@pytest.mark.timeout(600)
def test_compose_accepts_all_of_it(engine: Engine) -> None:
    """With the profile that plain `docker compose up` takes, from deploy/.env."""
    config = yaml.safe_load(engine.docker("compose", "-f", str(COMPOSE), "config"))
    assert {"prometheus", "grafana", "otel-collector", "jaeger"} <= config["services"].keys()
    assert config["services"]["gateway"]["environment"]["TENSORWAY_TRACE_ENDPOINT"] == "otel-collector:4317"
    small = yaml.safe_load(engine.docker("compose", "-f", str(COMPOSE), "--env-file", "deploy/small.env", "config"))
    assert set(small["services"]) == {"consul", "gateway", "orchestrator", "worker", "envoy"}
    assert small["services"]["gateway"]["environment"]["TENSORWAY_TRACE_ENDPOINT"] == ""


@needs_engine
@pytest.mark.timeout(600)
def test_clients_are_answered_through_envoy_and_past_it(mesh: Engine) -> None:
    for endpoint in ("127.0.0.1:8001", "127.0.0.1:8080"):
        assert "50 answered" in call(mesh, endpoint)
    body = json.dumps({"model": "identity", "inputs": [{"name": "input", "dtype": "DATA_TYPE_FP32", "shape": [1, 1], "data": "AACAPw=="}]})
    done = mesh.run("curl", "-sS", "-H", "content-type: application/json", "-d", body, "http://127.0.0.1:8080/v1/models/identity:infer")
    assert json.loads(done.stdout)["outputs"][0]["data"] == "AACAPw==", done.stdout


@needs_engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("service", ["worker", "orchestrator"])
def test_one_that_is_killed_is_not_missed(mesh: Engine, service: str) -> None:
    first, *rest = containers(mesh, service)
    assert len(rest) == 1
    mesh.docker("kill", first)
    assert "50 answered" in call(mesh, "127.0.0.1:8080")
    mesh.docker("start", first)
    _wait_healthy(mesh, first)


@needs_engine
@pytest.mark.timeout(600)
def test_one_that_is_cut_off_is_not_missed(mesh: Engine) -> None:
    first, _ = containers(mesh, "worker")
    mesh.docker("network", "disconnect", "tensorway_mesh", first)
    assert "50 answered" in call(mesh, "127.0.0.1:8080")
    mesh.docker("network", "connect", "tensorway_mesh", first)
    assert "50 answered" in call(mesh, "127.0.0.1:8080")


@needs_engine
@pytest.mark.timeout(600)
def test_a_container_that_is_told_to_stop_ends_by_itself(mesh: Engine) -> None:
    first, _ = containers(mesh, "worker")
    began_s = time.monotonic()
    mesh.docker("stop", "--time", "60", first)
    (state,) = json.loads(mesh.docker("inspect", first))
    assert state["State"]["ExitCode"] == 0, mesh.docker("logs", "--tail", "30", first)
    assert time.monotonic() - began_s < 40.0
    assert "50 answered" in call(mesh, "127.0.0.1:8080")


def _wait_healthy(engine: Engine, container: str) -> None:
    give_up_s = time.monotonic() + RECOVERY_S
    while (found := engine.docker("inspect", "--format", "{{.State.Health.Status}}", container).strip()) != "healthy":
        assert time.monotonic() < give_up_s, found
        subprocess.run(["sleep", "0.5"], check=True)

