"""The manifests as kubectl's kustomize puts them together: valid by Kubernetes' own schemas, and true about our services."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tensorway.transport.health import LIVENESS
from tensorway_gateway.settings import GatewaySettings
from tensorway_orchestrator.settings import OrchestratorSettings
from tensorway_worker.settings import NodeSettings
from tests.deploy.envoy import ROOT, shipped

MANIFESTS = ROOT / "deploy" / "kubernetes"
VARIANTS = ("base", "overlays/cpu", "overlays/gpu", "overlays/multi-node")
SETTINGS = {"gateway": GatewaySettings, "orchestrator": OrchestratorSettings, "worker": NodeSettings}
VERSION = "1.37"
#: First and last port of those that leaders take, and one of the kernel's ephemeral range, where ranks of several pods meet.
LEADERS = (8100, 8199)
EPHEMERAL = 33768


@cache
def validate(item: str) -> None:
    """Raises ValidationError; once for what several variants share, for each look reads a schema anew."""
    kubernetes_validate.validate(json.loads(item), VERSION, strict=True)


@cache
def built(variant: str) -> tuple[dict[str, Any], ...]:
    """Everything that `kubectl apply -k` would send."""
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(MANIFESTS / variant)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(variant: str, *kinds: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in built(variant) if item["kind"] in kinds}


def workloads(variant: str) -> dict[str, dict[str, Any]]:
    return of_kind(variant, "Deployment", "StatefulSet")


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(workload)["containers"]
    return dict(found)


def environment(variant: str, name: str) -> dict[str, Any]:
    """The variables of a service, from the shared map and its own; what comes from the pod is None."""
    found = container(workloads(variant)[name])
    maps = of_kind(variant, "ConfigMap")
    shared = {key: value for source in found.get("envFrom", ()) for key, value in maps[source["configMapRef"]["name"]]["data"].items()}
    return shared | {item["name"]: item.get("value") for item in found["env"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_manifest_fits_its_schema(variant: str) -> None:
    assert len(built(variant)) > 20
    for item in built(variant):
        validate(json.dumps(item))


def test_a_manifest_that_does_not_fit_is_found() -> None:
    broken = {**built("base")[0], "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_in_one_namespace(variant: str) -> None:
    assert {item["metadata"].get("namespace") for item in built(variant) if item["kind"] != "Namespace"} == {"tensorway"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_keeps_to_the_restricted_standard(variant: str) -> None:
    for name, workload in workloads(variant).items():
        security = pod(workload)["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod(workload)["automountServiceAccountToken"] is False, name
        assert pod(workload)["serviceAccountName"] in of_kind(variant, "ServiceAccount"), name
        own = container(workload)["securityContext"]
        assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_container_has_probes_resources_and_a_version(variant: str) -> None:
    for name, workload in workloads(variant).items():
        found = container(workload)
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= found.keys(), name
        for what in ("requests", "limits"):
            assert {"cpu", "memory"} <= found["resources"][what].keys(), name
        tag = found["image"].partition(":")[2]
        assert tag, found["image"]
        assert tag != "latest"


@pytest.mark.parametrize("variant", VARIANTS)
def test_alive_is_asked_of_the_process_and_ready_of_the_service(variant: str) -> None:
    for name in SETTINGS:
        found = container(workloads(variant)[name])
        ports = {port["name"]: port["containerPort"] for port in found["ports"]}
        if "TENSORWAY_TLS_CERT" in environment(variant, name):
            for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
                assert found[probe]["httpGet"] == {"path": path, "port": ports["ops"]}
        else:
            assert found["startupProbe"]["grpc"] == found["livenessProbe"]["grpc"] == {"port": ports["grpc"], "service": LIVENESS}
            assert found["readinessProbe"]["grpc"] == {"port": ports["grpc"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variable_is_a_setting_with_a_good_value(variant: str) -> None:
    for name, settings in SETTINGS.items():
        given = {}
        for variable, value in environment(variant, name).items():
            field = variable.removeprefix("TENSORWAY_").lower()
            assert variable.startswith("TENSORWAY_"), variable
            assert field in settings.model_fields, variable
            if value is not None:
                given[field] = value
        settings(**given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_services_listen_where_kubernetes_looks(variant: str) -> None:
    services = of_kind(variant, "Service")
    for name in SETTINGS:
        ports = {port["name"]: port["containerPort"] for port in container(workloads(variant)[name])["ports"]}
        given = environment(variant, name)
        assert given["TENSORWAY_LISTEN"] == f"0.0.0.0:{ports['grpc']}"
        assert given["TENSORWAY_OPS_LISTEN"] == f"0.0.0.0:{ports['ops']}"
        assert {port["name"]: port["port"] for port in services[name]["spec"]["ports"]} == ports
        assert services[name]["spec"]["clusterIP"] == "None"
        assert container(workloads(variant)[name])["command"] == ["tensorway", name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_kubernetes_waits_longer_than_the_services_do(variant: str) -> None:
    for name, settings in SETTINGS.items():
        given = environment(variant, name)
        defaults = settings.model_fields
        needed = sum(float(given.get(f"TENSORWAY_{field.upper()}") or defaults[field].default) for field in ("grace_s", "drain_delay_s"))
        assert pod(workloads(variant)[name])["terminationGracePeriodSeconds"] > needed
    # Longer than DNS, and Envoy's look at health, need to see that a gateway leaves.
    assert float(environment(variant, "gateway")["TENSORWAY_DRAIN_DELAY_S"]) >= 2


def admits(variant: str, source: str, target: str, port: int) -> bool:
    """Whether the policies let pods of `source` dial `port` of pods of `target`: egress of the one, and ingress of the other."""
    policies = of_kind(variant, "NetworkPolicy").values()
    leaves = any(
        _fits(policy["spec"]["podSelector"], source) and _lets(rule, "to", target, port)
        for policy in policies for rule in policy["spec"].get("egress", ())
    )
    enters = any(
        _fits(policy["spec"]["podSelector"], target) and _lets(rule, "from", source, port)
        for policy in policies for rule in policy["spec"].get("ingress", ())
    )
    return leaves and enters


def _lets(rule: dict[str, Any], side: str, peer: str, port: int) -> bool:
    peers = rule.get(side)
    is_peer = peers is None or any("podSelector" in item and _fits(item["podSelector"], peer) for item in peers)
    return is_peer and any(item["port"] <= port <= item.get("endPort", item["port"]) for item in rule["ports"])


def _fits(selector: dict[str, Any], name: str) -> bool:
    if "matchLabels" in selector:
        return bool(selector["matchLabels"] == {"app.kubernetes.io/name": name})
    return all(name in item["values"] for item in selector.get("matchExpressions", ()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_policies_let_through_what_the_mesh_needs_and_nothing_else(variant: str) -> None:
    leader = LEADERS[0] + 50
    is_spread = variant == "overlays/multi-node"
    reachable = {
        (source, target, port)
        for source in SETTINGS for target in SETTINGS for port in (8001, 8002, 8011, 8012, 8021, 8022, leader, EPHEMERAL)
        if admits(variant, source, target, port)
    }
    expected = {
        ("gateway", "gateway", 8001), ("gateway", "orchestrator", 8011), ("gateway", "worker", 8021), ("gateway", "worker", leader),
        ("orchestrator", "worker", leader),
    }
    assert reachable == expected | ({("worker", "worker", 8021), ("worker", "worker", EPHEMERAL)} if is_spread else set())
    assert of_kind(variant, "NetworkPolicy")["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "base"])
def test_consul_and_the_members_reach_each_other(variant: str) -> None:
    for name, (_, port) in {"gateway": (0, 8001), "orchestrator": (0, 8011), "worker": (0, 8021)}.items():
        assert admits(variant, name, "consul", 8500)
        assert admits(variant, "consul", name, port)
        assert not admits(variant, name, "consul", 8300)
    assert admits(variant, "consul", "worker", LEADERS[1])
    servers = workloads(variant)["consul"]["spec"]["replicas"]
    registry = environment(variant, "gateway")["TENSORWAY_REGISTRY"]
    assert registry == f"consul://{','.join(f'consul-{number}.consul:8500' for number in range(servers))}/tensorway"


@pytest.mark.parametrize("variant", ["overlays/cpu", "overlays/gpu"])
def test_the_front_proxy_is_the_shipped_one_and_reaches_gateways_only(variant: str) -> None:
    (config,) = [item for name, item in of_kind(variant, "ConfigMap").items() if name.startswith("front-proxy")]
    assert yaml.safe_load(config["data"]["front-proxy.yaml"]) == shipped("front-proxy.yaml")
    assert "tensorway.pb" in config["binaryData"]
    assert admits(variant, "front-proxy", "gateway", 8001)
    assert not admits(variant, "front-proxy", "orchestrator", 8011)
    assert not admits(variant, "front-proxy", "worker", LEADERS[0])
    (cluster,) = shipped("front-proxy.yaml")["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    assert of_kind(variant, "Service")[address["address"]]["spec"]["ports"][0]["port"] == address["port_value"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_budgets_and_scalers_point_at_something(variant: str) -> None:
    found = workloads(variant)
    budgets = of_kind(variant, "PodDisruptionBudget")
    assert budgets.keys() == found.keys()
    scalers = of_kind(variant, "HorizontalPodAutoscaler")
    assert {"gateway", "orchestrator"} <= scalers.keys()
    for name, scaler in scalers.items():
        target = scaler["spec"]["scaleTargetRef"]
        assert (found[name]["kind"], found[name]["metadata"]["name"]) == (target["kind"], target["name"])
        assert "replicas" not in found[name]["spec"], f"{name}: two would decide the number"


def test_the_adapters_rules_use_metrics_that_exist() -> None:
    rules = yaml.safe_load((MANIFESTS / "components" / "custom-metrics" / "adapter-rules.yaml").read_text())
    series = {rule["seriesQuery"].partition("{")[0] for rule in (*rules["rules"], *rules["externalRules"])}
    told = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in told for name in series)
    wanted = {
        metric.get("pods", metric.get("external"))["metric"]["name"]
        for scaler in of_kind("overlays/gpu", "HorizontalPodAutoscaler").values()
        for metric in scaler["spec"]["metrics"] if metric["type"] in ("Pods", "External")
    }
    given = {"tensorway_gateway_in_flight_requests", *(rule["name"]["as"] for rule in rules["externalRules"])}
    assert wanted == given


def test_workers_with_gpus_ask_for_them() -> None:
    for variant, count in (("overlays/gpu", "1"), ("overlays/multi-node", "8")):
        resources = container(workloads(variant)["worker"])["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == count
