"""The set-ups for Istio, Linkerd and Consul's mesh parse, and keep to the same rules as our own Envoy. None of the three is run here."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy.envoy import ROOT

MESH = ROOT / "deploy" / "mesh"
RETRIES = {"connect-failure", "refused-stream", "reset-before-request"}


def documents(name: str) -> dict[str, dict[str, Any]]:
    """By kind."""
    return {item["kind"]: item for item in yaml.safe_load_all((MESH / name / "gateway.yaml").read_text())}


@pytest.mark.parametrize("name", ["istio", "linkerd", "consul"])
def test_every_document_has_a_place(name: str) -> None:
    for item in documents(name).values():
        assert item["apiVersion"].count("/") == 1
        assert item["metadata"]["namespace"] == "tensorway"
        assert item["spec"]


def test_istio_sends_again_what_nobody_began_and_ejects_for_nothing_else() -> None:
    found = documents("istio")
    (route,) = found["VirtualService"]["spec"]["http"]
    assert set(route["retries"]["retryOn"].split(",")) == RETRIES
    assert route["timeout"] == "0s"
    ejection = found["DestinationRule"]["spec"]["trafficPolicy"]["outlierDetection"]
    assert (ejection["consecutive5xxErrors"], ejection["consecutiveGatewayErrors"]) == (0, 0)


def test_linkerd_sends_nothing_again() -> None:
    assert not any(route["isRetryable"] for route in documents("linkerd")["ServiceProfile"]["spec"]["routes"])


def test_consul_sends_again_what_nobody_began_and_ejects_for_nothing_else() -> None:
    found = documents("consul")
    (route,) = found["ServiceRouter"]["spec"]["routes"]
    assert set(route["destination"]["retryOn"]) == RETRIES
    assert found["ServiceDefaults"]["spec"]["protocol"] == "grpc"
    assert found["ServiceDefaults"]["spec"]["upstreamConfig"]["defaults"]["passiveHealthCheck"]["enforcingConsecutive5xx"] == 0
    assert found["ServiceIntentions"]["spec"]["sources"][-1] == {"name": "*", "action": "deny"}
