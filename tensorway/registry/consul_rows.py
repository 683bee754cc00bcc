"""How registrations, claims and documents are written down in Consul. Pure: words in, words out.

    service PREFIX-KIND, ID PREFIX-KIND-ID   a registration; its metadata, and what this module adds under `tensorway-…`, are the service's
    key PREFIX/documents/KEY                 a document
    key PREFIX/claims/KEY                    a claim: the value is the holder, the lock is a session
    key PREFIX/doors/KIND/ID                 held by whoever is registering that id, so that two cannot do it at once
    key PREFIX/mesh                          a random name; another one, or none, means that Consul has lost its data
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote

from tensorway.errors import FailedPrecondition
from tensorway.registry.port import Registration

#: Consul's limits for a service's metadata and for a KV value, bytes.
MAX_META_PAIRS: Final = 64
MAX_META_KEY: Final = 128
MAX_META_VALUE_BYTES: Final = 512
MAX_VALUE_BYTES: Final = 512 * 1024
#: What a service answers health checks under for as long as it lives: `tensorway.transport.health.LIVENESS`, which cannot be imported
#: here without grpc.
LIVENESS: Final = "tensorway.liveness"
_OWN: Final = "tensorway-"
_ID, _OWNER, _SINCE, _ENDPOINT = f"{_OWN}id", f"{_OWN}owner", f"{_OWN}since", f"{_OWN}endpoint"
_META_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]")
_UNSAFE_TAG: Final = re.compile(r"[^A-Za-z0-9-]+")
#: Checks of a whole machine, or of an operator who takes something out of service: they end membership as a dead owner does.
_NODE_CHECKS: Final = ("serfHealth", "_node_maintenance")
_MAINTENANCE: Final = "_service_maintenance:"

_LIVENESS_INTERVAL: Final = "1s"
#: A stopped process accepts connections and answers nothing: it counts as dead after this. A busy one needs the time.
_LIVENESS_TIMEOUT: Final = "3s"
_READINESS_INTERVAL: Final = "2s"
#: A TTL check: passed every second, so four may be missed.
TTL_CHECK: Final = "5s"
#: The least that Consul allows. Rows of the dead are out of every view long before.
_REAPED_AFTER: Final = "1m"


@dataclass(frozen=True, slots=True)
class Row:
    """A registration as it stands in Consul. Of several with one id (agents that were used before), the latest `since_ms` counts."""

    registration: Registration
    #: Random name of the registry object that registered it.
    owner: str
    since_ms: int
    is_live: bool


def service_name(prefix: str, kind: str) -> str:
    """The service of all registrations of `kind`; also its name in DNS."""
    return f"{prefix}-{kind}"


def service_id(prefix: str, kind: str, id_: str) -> str:
    """The service ID: of letters that need no escaping in a URL, and no capitals, which Consul does not tell from small letters; a hash
    keeps apart what that makes alike."""
    safe = _UNSAFE.sub("_", id_.lower())
    if safe != id_ or not safe.strip(".") or len(safe) > 128:
        safe = f"{safe[:128]}-{hashlib.sha256(id_.encode()).hexdigest()[:8]}"
    return f"{prefix}-{kind}-{safe}"


def liveness_check_id(service: str) -> str:
    """The ID of the check that decides membership."""
    return f"{service}:liveness"


def service_payload(prefix: str, registration: Registration, owner: str, since_ms: int, has_ttl: bool) -> dict[str, Any]:
    """What the agent is told to register. Raises FailedPrecondition for metadata that Consul cannot hold."""
    id_ = service_id(prefix, registration.kind, registration.id)
    host, port = _host_and_port(registration.endpoint)
    meta = {_ID: registration.id, _OWNER: owner, _SINCE: str(since_ms), _ENDPOINT: registration.endpoint}
    check_metadata({**registration.metadata, **meta})
    for key in registration.metadata:
        if key.startswith(_OWN):
            raise FailedPrecondition(f"metadata {key!r} of {registration.id!r}: names that begin with {_OWN} are the registry's own")
    return {
        "Name": service_name(prefix, registration.kind), "ID": id_, "Address": host, "Port": port,
        "Tags": _tags(registration, port), "Meta": {**registration.metadata, **meta},
        "Checks": _checks(id_, registration, has_ttl),
    }


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises FailedPrecondition for what Consul would refuse."""
    if len(metadata) > MAX_META_PAIRS:
        raise FailedPrecondition(f"{len(metadata)} pairs of metadata are more than Consul's {MAX_META_PAIRS}", field="metadata")
    for key, value in metadata.items():
        if not _META_KEY.fullmatch(key) or len(key) > MAX_META_KEY:
            raise FailedPrecondition(f"metadata {key!r}: Consul takes at most {MAX_META_KEY} of A-Z a-z 0-9 _ -", field=f"metadata.{key}")
        if (size := len(value.encode())) > MAX_META_VALUE_BYTES:
            raise FailedPrecondition(
                f"metadata {key!r} has {size} bytes, more than Consul's {MAX_META_VALUE_BYTES}", field=f"metadata.{key}"
            )


def read_row(entry: Mapping[str, Any]) -> Row | None:
    """A row of `/v1/health/service`; None for a service of that name that is not of this mesh's making."""
    service = entry["Service"]
    row = read_service(service)
    if row is None:
        return None
    deciding = {liveness_check_id(service["ID"]), f"{_MAINTENANCE}{service['ID']}", *_NODE_CHECKS}
    is_live = all(check["Status"] != "critical" for check in entry["Checks"] if check["CheckID"] in deciding)
    return Row(row.registration, row.owner, row.since_ms, is_live)


def read_service(service: Mapping[str, Any]) -> Row | None:
    """A service definition as a row that counts as live; None for one that is not of this mesh's making."""
    meta = dict(service.get("Meta") or {})
    try:
        id_, owner, endpoint, since_ms = meta.pop(_ID), meta.pop(_OWNER), meta.pop(_ENDPOINT), int(meta.pop(_SINCE))
    except (KeyError, ValueError):
        return None
    kind = str(service["Service"]).rpartition("-")[2]
    return Row(Registration(kind, id_, endpoint, meta), owner, since_ms, True)


def live_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """The live rows by registration id, the latest of each."""
    found: dict[str, Row] = {}
    for row in rows:
        known = found.get(row.registration.id)
        if row.is_live and (known is None or row.since_ms > known.since_ms):
            found[row.registration.id] = row
    return found


def liveness_output(checks: Iterable[Mapping[str, Any]] | None, service: str) -> str | None:
    """What Consul says against the liveness of `service`; None while it counts as alive."""
    for check in checks or ():
        if check["CheckID"] == liveness_check_id(service) and check["Status"] == "critical":
            return str(check["Output"])
    return None


def quote_key(key: str) -> str:
    """`key` as a part of a KV key. Slashes stay, for the folders of Consul's UI; what an HTTP path would not survive is percent-encoded."""
    quoted = re.sub(r"(?<=/)/|^/", "%2F", quote(key, safe="/"))
    return "/".join(part.replace(".", "%2E") if part in (".", "..") else part for part in quoted.split("/"))


def unquote_key(key: str) -> str:
    """The inverse of `quote_key`."""
    return unquote(key)


def folder_of(prefix: str) -> str:
    """The folder in which every key that begins with `prefix` lies: "" or one that ends with a slash."""
    folder, slash, _ = prefix.rpartition("/")
    return folder + slash


def check_size(key: str, value: bytes) -> None:
    """Raises FailedPrecondition for a value that is too large."""
    if len(value) > MAX_VALUE_BYTES:
        raise FailedPrecondition(f"registry value {key!r} has {len(value)} bytes, more than {MAX_VALUE_BYTES}")


def _host_and_port(endpoint: str) -> tuple[str, int]:
    """Address and port; none for a socket of the file system."""
    host, _, port = endpoint.rpartition(":")
    if endpoint.startswith("unix:") or not port.isdigit():
        return "", 0
    return host.strip("[]"), int(port)


def has_grpc_endpoint(endpoint: str) -> bool:
    """Whether an agent can dial it."""
    return _host_and_port(endpoint)[1] != 0


def _tags(registration: Registration, port: int) -> list[str]:
    """For others (DNS, Envoy, Prometheus); nothing here reads them."""
    tags = ["grpc"] if port else []
    named = ((word, registration.metadata.get(word)) for word in ("model", "zone"))
    tags += [f"{word}-{_UNSAFE_TAG.sub('-', value).strip('-')}" for word, value in named if value]
    if ops := registration.metadata.get("ops"):
        tags.append(f"ops={ops}")
    return tags


def _checks(id_: str, registration: Registration, has_ttl: bool) -> list[dict[str, Any]]:
    endpoint = registration.endpoint
    # The agent dials an address, which is not in a member's certificate. It shows its own where `enable_agent_tls_for_checks` is set.
    tls = {"GRPCUseTLS": True, "TLSSkipVerify": True} if registration.metadata.get("tls") else {}
    # The owner lives, for it is the one who registers: a check that began as critical would hide it for up to a second.
    liveness = {"CheckID": liveness_check_id(id_), "Status": "passing", "DeregisterCriticalServiceAfter": _REAPED_AFTER}
    if has_ttl:
        return [{**liveness, "Name": "liveness: the owner reports", "TTL": TTL_CHECK}]
    return [
        {
            **liveness, "Name": "liveness: the process answers", "GRPC": f"{endpoint}/{LIVENESS}",
            "Interval": _LIVENESS_INTERVAL, "Timeout": _LIVENESS_TIMEOUT, **tls,
        },
        {
            # Only others look at it: DNS and Envoy skip what is not ready. An orchestrator that waits for its first group is a member.
            "CheckID": f"{id_}:readiness", "Name": "readiness: it can do its work", "GRPC": endpoint,
            "Interval": _READINESS_INTERVAL, "Timeout": _LIVENESS_TIMEOUT, **tls,
        },
    ]


