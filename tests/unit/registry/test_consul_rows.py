"""Registrations and keys as they are written down in Consul, and read again."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import FailedPrecondition
from tensorway.registry import consul_rows as rows
from tensorway.registry.port import GROUP, NODE, Registration
from tensorway.transport.health import LIVENESS


def entry_of(payload: dict[str, Any], statuses: dict[str, str] | None = None) -> dict[str, Any]:
    """A row of /v1/health/service as Consul makes it of a registration; `statuses` by check ID, the rest passes."""
    ids = dict.fromkeys([*(check["CheckID"] for check in payload["Checks"]), "serfHealth", *(statuses or {})], "passing")
    checks = [{"CheckID": id_, "Status": status} for id_, status in {**ids, **(statuses or {})}.items()]
    service = {"ID": payload["ID"], "Service": payload["Name"], "Meta": payload["Meta"]}
    return {"Node": {}, "Service": service, "Checks": checks}


def payload_of(registration: Registration, since_ms: int = 5, owner: str = "me", has_ttl: bool = False) -> dict[str, Any]:
    return rows.service_payload("mesh", registration, owner, since_ms, has_ttl)


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.dictionaries(st.from_regex(r"[a-zA-Z0-9_]{1,20}", fullmatch=True), st.text(st.characters(codec="utf-8"), max_size=100), max_size=5),
)
def test_a_registration_comes_back_as_it_was(id_: str, metadata: dict[str, str]) -> None:
    registration = Registration(GROUP, id_, "192.0.2.1:80", metadata)
    payload = payload_of(registration)
    assert re.fullmatch(r"[a-z0-9_.-]+", payload["ID"]), "Consul does not tell capitals from small letters, and URLs hold no more"
    row = rows.read_row(entry_of(payload))
    assert row == rows.Row(registration, "me", 5, True)


@given(st.lists(st.text(st.sampled_from("aAbB/_.-ä"), min_size=1, max_size=4), min_size=2, max_size=20, unique=True))
def test_no_two_ids_share_a_service(ids: list[str]) -> None:
    assert len({rows.service_id("mesh", NODE, id_) for id_ in ids}) == len(ids)


@pytest.mark.parametrize(("check", "is_live"), [
    ("mesh-node-n:liveness", False), ("serfHealth", False), ("_service_maintenance:mesh-node-n", False), ("_node_maintenance", False),
    ("mesh-node-n:readiness", True), ("somebody-elses", True),
])
def test_only_what_concerns_life_decides_membership(check: str, is_live: bool) -> None:
    row = rows.read_row(entry_of(payload_of(Registration(NODE, "n", "a:1")), {check: "critical"}))
    assert row is not None
    assert row.is_live is is_live
    assert bool(rows.live_rows([row])) is is_live


def test_the_latest_live_row_of_an_id_counts() -> None:
    made = [
        rows.read_row(entry_of(payload_of(Registration(NODE, "n", f"a:{since}"), since, f"owner-{since}"), {"serfHealth": status}))
        for since, status in ((3, "passing"), (7, "passing"), (9, "critical"), (5, "passing"))
    ]
    found = rows.live_rows(row for row in made if row is not None)
    assert found["n"].registration.endpoint == "a:7"


def test_a_service_of_somebody_else_is_no_row() -> None:
    strange = {"tensorway-id": "x", "tensorway-owner": "", "tensorway-endpoint": "", "tensorway-since": "-"}
    for meta in (None, {}, {"tensorway-id": "x"}, strange):
        assert rows.read_row({"Service": {"ID": "x", "Service": "mesh-node", "Meta": meta}, "Checks": []}) is None


@pytest.mark.parametrize(("endpoint", "has_ttl", "address", "port", "checks"), [
    ("192.0.2.1:80", False, "192.0.2.1", 80, [f"192.0.2.1:80/{LIVENESS}", "192.0.2.1:80"]),
    ("[::1]:80", False, "::1", 80, [f"[::1]:80/{LIVENESS}", "[::1]:80"]),
    ("192.0.2.1:80", True, "192.0.2.1", 80, [None]),
    ("unix:/run/x.sock", True, "", 0, [None]),
])
def test_what_an_agent_asks(endpoint: str, has_ttl: bool, address: str, port: int, checks: list[str | None]) -> None:
    payload = payload_of(Registration(NODE, "n", endpoint), has_ttl=has_ttl)
    assert (payload["Address"], payload["Port"]) == (address, port)
    assert [check.get("GRPC") for check in payload["Checks"]] == checks
    assert payload["Checks"][0]["Status"] == "passing"
    assert "Status" not in payload["Checks"][-1] or len(checks) == 1


def test_an_endpoint_that_no_agent_can_dial_needs_a_report() -> None:
    assert all(map(rows.has_grpc_endpoint, ("a:1", "[::1]:1")))
    assert not any(map(rows.has_grpc_endpoint, ("unix:/x", "unix:/x:1", "nowhere")))


@pytest.mark.parametrize(("metadata", "part"), [
    ({"k": "x" * 513}, "metadata 'k' has 513 bytes, more than Consul's 512"),
    ({"k": "ä" * 257}, "metadata 'k' has 514 bytes"),
    ({"k k": "x"}, "metadata 'k k': Consul takes"),
    ({"k" * 129: "x"}, "Consul takes at most 128"),
    ({f"k{number}": "x" for number in range(61)}, "65 pairs of metadata"),
    ({"tensorway-id": "x"}, "names that begin with tensorway- are the registry's own"),
])
def test_what_consul_cannot_hold_is_refused_by_name(metadata: dict[str, str], part: str) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        payload_of(Registration(NODE, "n", "a:1", metadata))
    assert part in str(refused.value)


def test_the_liveness_name_is_the_one_that_services_answer() -> None:
    assert rows.LIVENESS == LIVENESS


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20), st.integers(0, 20))
def test_keys_come_back_as_they_were_and_prefixes_find_them(key: str, length: int) -> None:
    quoted = rows.quote_key(key)
    assert rows.unquote_key(quoted) == key
    assert "//" not in quoted and not quoted.startswith("/")
    assert not {".", ".."}.intersection(quoted.split("/"))
    assert quoted.startswith(rows.quote_key(rows.folder_of(key[:length])))


@given(st.lists(st.text(st.sampled_from("a/.%"), max_size=6), min_size=2, unique=True))
def test_no_two_keys_share_a_place(keys: list[str]) -> None:
    assert len({rows.quote_key(key) for key in keys}) == len(keys)
