"""One version of the access file, ready to be asked. Immutable but for the key sets' keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tensorway.access.permissions import Grants
from tensorway.access.reading import read_access_file
from tensorway.access.schema import IssuerRule
from tensorway_gateway.identity.caller import ANONYMOUS, Caller
from tensorway_gateway.identity.key_sets import KeySet
from tensorway_gateway.identity.quota import Meters
from tensorway_gateway.identity.tokens import Claims

#: "Until" of what does not expire.
ALWAYS: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Known:
    """A caller, what kind of credential proved it, and until when (seconds since 1970)."""

    caller: Caller
    kind: str
    until_s: float


class Policy:
    """Reads the file and what it names. Raises FailedPrecondition that lists all that is wrong."""

    def __init__(self, path: Path, meters: Meters, on_keys: Callable[[], None], before: Policy | None = None) -> None:
        """`before` is the version that serves now; `on_keys` is called in the loop when an issuer's keys have changed."""
        access = self._access = read_access_file(path)
        self._meters = meters
        self._grants: dict[tuple[str, frozenset[str]], Grants] = {}
        old: Mapping[str, KeySet] = {} if before is None else before.key_sets
        #: By the claim `iss`.
        self.key_sets: Final[Mapping[str, KeySet]] = {
            rule.issuer: KeySet(rule, path, on_keys, old.get(rule.issuer)) for rule in access.issuers
        }
        #: Everything the policy was read from.
        self.files: Final = (path, *(file for key_set in self.key_sets.values() for file in key_set.files))
        #: By the digest of the API key.
        self.keys: Final[dict[bytes, Known]] = {}
        now_s = time.monotonic()
        for key in access.keys:
            caller = Caller(f"key:{key.name}", access.grants(key.allow), meters.of(f"key:{key.name}", access.quota(key.quota), now_s))
            for item in key.hashes:
                ends = [each.timestamp() for each in (key.not_after, item.not_after) if each is not None]
                self.keys[bytes.fromhex(item.hash.partition(":")[2])] = Known(caller, "key", min(ends, default=ALWAYS))
        #: By a name in the certificate.
        self.certificates: Final[dict[str, Known]] = {}
        for rule in access.certificates:
            principal = f"certificate:{rule.name}"
            caller = Caller(principal, access.grants(rule.allow), meters.of(principal, access.quota(rule.quota), now_s))
            self.certificates[rule.name] = Known(caller, "certificate", ALWAYS)
        everybody = access.anonymous
        anonymous = Caller(ANONYMOUS, access.grants(everybody.allow), meters.of(ANONYMOUS, access.quota(everybody.quota), now_s))
        self.anonymous: Final = Known(anonymous, "anonymous", ALWAYS)

    @property
    def summary(self) -> str:
        access = self._access
        return f"{len(access.keys)} keys, {len(access.issuers)} issuers, {len(access.certificates)} certificates, {len(access.roles)} roles"

    def of_token(self, rule: IssuerRule, claims: Claims) -> Known:
        """The caller that a genuine token proves."""
        known_scopes = claims.scopes & rule.scopes.keys()
        key = (rule.name, frozenset(known_scopes))
        grants = self._grants.get(key)
        if grants is None:
            allow = [*rule.allow, *(item for scope in sorted(known_scopes) for item in rule.scopes[scope])]
            grants = self._grants[key] = self._access.grants(allow)
        principal = f"jwt:{rule.name}:{claims.subject}"
        meter = self._meters.of(principal, self._access.quota(rule.quota), time.monotonic())
        return Known(Caller(principal, grants, meter), "jwt", claims.until_s)
