"""Every shipped Envoy configuration is one that Envoy takes, and those that should be equal are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.certificates import Authority
from tests.deploy.envoy import SHIPPED, rendered, shipped, validate

BOOTSTRAPS = ("front-proxy.yaml", "front-proxy-tls.yaml", "sidecar-server.yaml", "sidecar-client.yaml")


def certified(folder: Path) -> Path:
    authority = Authority.made()
    authority.write(folder, "front", "localhost")
    return authority.write(folder, "tls", "gateway.tensorway.internal")


def test_all_are_known() -> None:
    found = {path.name for path in SHIPPED.glob("*.yaml")}
    assert found == {*BOOTSTRAPS, "kustomization.yaml", "sds-front.yaml", "sds-mesh.yaml", "sds-authority.yaml"}


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_envoy_takes_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "gateways.json").write_text(json.dumps({"resources": []}))
    config = rendered(tmp_path, name, tls=certified(tmp_path / "tls"))
    status, output = validate(config)
    assert status == 0, output
    assert "eprecated" not in output


@pytest.mark.parametrize("name", ["front-proxy.yaml", "front-proxy-tls.yaml"])
def test_envoy_takes_it_with_its_commented_part(tmp_path: Path, name: str) -> None:
    (tmp_path / "gateways.json").write_text(json.dumps({"resources": []}))
    key = {"kty": "oct", "alg": "HS256", "kid": "1", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQ"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [key]}))
    rendered(tmp_path, name, tls=certified(tmp_path / "tls"))
    text = (SHIPPED / name).read_text()
    assert "# jwt: " in text
    config = tmp_path / "with-jwt.yaml"
    config.write_text(text.replace("# jwt: ", "").replace("/etc/envoy", str(tmp_path)).replace("/run/envoy", str(tmp_path)))
    status, output = validate(config)
    assert status == 0, output


def test_a_broken_one_is_found(tmp_path: Path) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text((SHIPPED / "front-proxy.yaml").read_text().replace("stat_prefix", "stat_prefx"))
    assert validate(config)[0] != 0


def test_the_two_front_proxies_differ_in_tls_and_where_gateways_come_from_only() -> None:
    plain, secure = shipped("front-proxy.yaml"), shipped("front-proxy-tls.yaml")
    for config in (plain, secure):
        (listener,) = config["static_resources"]["listeners"]
        listener["address"]["socket_address"].pop("port_value")
        listener["filter_chains"][0].pop("transport_socket", None)
        (cluster,) = config["static_resources"]["clusters"]
        for key in ("type", "dns_lookup_family", "load_assignment", "eds_cluster_config", "transport_socket"):
            cluster.pop(key, None)
    assert plain == secure


def policies(value: Any) -> list[dict[str, Any]]:
    """Every retry_policy in a configuration."""
    if isinstance(value, list):
        return [found for item in value for found in policies(item)]
    if isinstance(value, dict):
        own = [value["retry_policy"]] if "retry_policy" in value else []
        return own + [found for item in value.values() for found in policies(item)]
    return []


@pytest.mark.parametrize("name", BOOTSTRAPS)
def test_envoy_sends_again_only_what_no_gateway_has_begun(name: str) -> None:
    for policy in policies(shipped(name)):
        assert policy["retry_on"] == "connect-failure,refused-stream,reset-before-request"
        assert policy["retry_host_predicate"][0]["name"] == "envoy.retry_host_predicates.previous_hosts"
    assert len(policies(shipped(name))) == (0 if name == "sidecar-server.yaml" else 1)
