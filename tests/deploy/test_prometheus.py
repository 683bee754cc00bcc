"""What is shipped for Prometheus and Grafana is sound: configurations, rules and dashboards, by Prometheus' own tools."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus import promtool

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
ALERTS = [rule for group in yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def test_the_rules_and_their_tests_are_sound() -> None:
    for word, folder in (("check", "rules"), ("test", "tests")):
        done = promtool(word, "rules", *map(str, (FOLDER / folder).glob("*.yml")))
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-http.yml"])
def test_the_configuration_is_sound(name: str) -> None:
    done = promtool("check", "config", str(FOLDER / name))
    assert done.returncode == 0, done.stdout


def test_the_configuration_with_consul_differs_only_in_how_it_finds_members(tmp_path: Path) -> None:
    # Debian's Prometheus is built without Consul: the rest of the file is checked without it.
    document = yaml.safe_load((FOLDER / "prometheus-consul.yml").read_text())
    (job,) = document["scrape_configs"]
    (finding,) = job.pop("consul_sd_configs")
    assert finding == {"server": "consul:8500", "services": ["tensorway-gateway", "tensorway-orchestrator", "tensorway-node"]}
    job["static_configs"] = [{"targets": ["localhost:8002"]}]
    document["rule_files"] = [str(FOLDER / "rules" / "*.yml")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(document))
    done = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stdout
    picks = [rule for rule in job["relabel_configs"] if rule["source_labels"] == ["__meta_consul_tags"]]
    # Prometheus joins tags with commas and puts one at either end.
    assert [re.fullmatch(rule["regex"], ",grpc,ops=127.0.0.7:8012,zone-a,")[1] for rule in picks] == ["127.0.0.7:8012"] * 2  # type: ignore[index]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do_and_is_tested(alert: dict[str, Any]) -> None:
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(".")
    assert alert["labels"]["severity"] in ("warning", "critical")
    tests = yaml.safe_load((FOLDER / "tests" / "alerts.yml").read_text())["tests"]
    (test,) = [test for test in tests if test["name"] == alert["alert"]]
    assert any(check.get("exp_samples") for check in test["promql_expr_test"]), "nothing shows that it fires"
    quiet = [check for check in test["promql_expr_test"] if not check.get("exp_samples")]
    assert quiet or len({series["series"] for series in test["input_series"]}) > 1, "nothing shows when it does not"


def test_dashboards_are_what_their_source_says() -> None:
    done = subprocess.run([sys.executable, GRAFANA / "dashboards.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((GRAFANA / "dashboards").glob("*.json")), ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    document = json.loads(path.read_text())
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    numbers = [panel["id"] for panel in document["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    known = {variable["name"] for variable in document["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= known
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in document["panels"]}
    assert len(places) == len(document["panels"]), "two panels at one place"
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_provisioning_leads_to_the_dashboards() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "tensorway.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["volumes"]
    uids = [json.loads(path.read_text())["uid"] for path in (GRAFANA / "dashboards").glob("*.json")]
    assert len(set(uids)) == len(uids) == 4
