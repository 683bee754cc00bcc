"""Who is calling: the credentials of a call, checked once and remembered for as long as they are good."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from asyncinotify import Inotify, Mask
from prometheus_client import CollectorRegistry

from tensorway.access.api_keys import PREFIX, digest, is_whole
from tensorway.errors import FailedPrecondition, PermissionDenied, Status, TensorwayError, Unauthenticated
from tensorway.transport.port import Call
from tensorway_gateway.identity.audit import AuditEntry, AuditLog
from tensorway_gateway.identity.caller import ANONYMOUS, Caller
from tensorway_gateway.identity.metrics import IdentityCollector
from tensorway_gateway.identity.policy import ALWAYS, Known, Policy
from tensorway_gateway.identity.quota import Meters, QuotaExceeded
from tensorway_gateway.identity.refusals import CredentialRefused
from tensorway_gateway.identity.tokens import is_token, verify_token

_LOG = logging.getLogger(__name__)
_MAX_REMEMBERED: Final = 10_000
_CHANGES: Final = Mask.CREATE | Mask.CLOSE_WRITE | Mask.DELETE | Mask.MOVED_TO | Mask.MOVED_FROM
#: One change is often several events.
_SETTLE_S: Final = 0.05
#: Where no event tells of a change (a network file system, a directory that was itself replaced), it is seen after this long.
_LOOK_ANYWAY_S: Final = 30.0
AUTHORIZATION: Final = "authorization"
API_KEY: Final = "x-api-key"


class Gate:
    """Lives in one loop. Raises FailedPrecondition at once where the access file cannot be used."""

    def __init__(self, access_file: str, audit: AuditLog) -> None:
        self._path = Path(access_file).expanduser().absolute()
        self._audit = audit
        self._meters = Meters()
        self._policy = Policy(self._path, self._meters, self._forget)
        #: Credential -> caller, by digest, so that no credential stays in memory. Keys are always here, tokens once they were checked.
        self._known: dict[bytes, Known] = dict(self._policy.keys)
        #: Kind of credential, or what was wrong with it -> calls.
        self.num_authentications: Counter[str] = Counter()
        #: Outcome -> versions of the access file.
        self.num_reloads: Counter[str] = Counter()
        #: Limit of a quota -> requests that were refused for it, and action -> requests that were not allowed.
        self.num_over_quota: Counter[str] = Counter()
        self.num_denied: Counter[str] = Counter()

    @property
    def audit(self) -> AuditLog:
        return self._audit

    def known(self, call: Call) -> Caller | None:
        """Who calls, where that is known without asking anybody; None where `identify` must look. Raises CredentialRefused."""
        credential = _credential(call.metadata)
        if not credential:
            found = self._uncredentialed(call)
        else:
            remembered = self._known.get(digest(credential))
            if remembered is None:
                return None
            found = remembered
        if found.until_s is not ALWAYS and found.until_s <= time.time():
            raise self._expired(found)
        self.num_authentications[found.kind] += 1
        return found.caller

    async def identify(self, call: Call) -> Caller:
        """Who calls with a credential that is not known yet. Raises CredentialRefused, or Unavailable where that cannot be said now."""
        credential = _credential(call.metadata)
        if not is_token(credential):
            raise _no_such_key(credential)
        while True:
            policy = self._policy
            rule, claims = await verify_token(credential, policy.key_sets)
            if policy is self._policy:
                break
        found = policy.of_token(rule, claims)
        if len(self._known) - len(policy.keys) >= _MAX_REMEMBERED:
            self._drop_oldest()
        self._known[digest(credential)] = found
        self.num_authentications[found.kind] += 1
        return found.caller

    def refused(self, call: Call, error: CredentialRefused) -> None:
        """Counts and writes down a credential that proved nothing."""
        self.num_authentications[error.outcome] += 1
        self._audit.note_refusal(
            AuditEntry(
                principal=ANONYMOUS, action="authenticate", method=call.method, model="", peer=call.peer, request_id="",
                outcome=error.outcome, status=Status.UNAUTHENTICATED.name, detail=error.message,
            )
        )

    def count(self, error: TensorwayError, action: str) -> None:
        """Counts a request that was refused for want of permission or quota; other errors are not counted here."""
        if isinstance(error, QuotaExceeded):
            self.num_over_quota[error.limit] += 1
        elif isinstance(error, PermissionDenied | Unauthenticated):
            self.num_denied[action] += 1

    def register(self, metrics: CollectorRegistry) -> None:
        """Has Prometheus read what is counted here."""
        IdentityCollector(self, metrics)

    async def run(self) -> None:
        """Follows the access file and the issuers' keys, and writes the audit log, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._audit.run(), name="audit log")
            await self._follow(tasks)

    async def _follow(self, tasks: asyncio.TaskGroup) -> None:
        policy: Policy | None = None
        fetching: list[asyncio.Task[None]] = []
        with Inotify() as inotify:
            contents = await asyncio.to_thread(_contents, self._policy.files)
            while True:
                if policy is not self._policy:
                    for task in fetching:
                        task.cancel()
                    policy = self._policy
                    fetching = [tasks.create_task(key_set.run(), name="issuer's keys") for key_set in policy.key_sets.values()]
                for folder in await asyncio.to_thread(_folders, policy.files):
                    inotify.add_watch(folder, _CHANGES)
                # What changed before the watch was set is seen too.
                found = await asyncio.to_thread(_contents, policy.files)
                if found != contents:
                    contents = found
                    self._reload()
                    contents = await asyncio.to_thread(_contents, self._policy.files) if policy is not self._policy else contents
                    continue
                await _change(inotify)

    def _reload(self) -> None:
        """A bad file changes nothing."""
        try:
            policy = Policy(self._path, self._meters, self._forget, self._policy)
        except FailedPrecondition as error:
            self.num_reloads["refused"] += 1
            _LOG.error("the access file has changed but cannot be used; what was read before holds: %s", error)
            return
        self.num_reloads["ok"] += 1
        self._policy = policy
        self._forget()
        _LOG.info("the access file was read anew: %s", policy.summary)

    def _forget(self) -> None:
        """What tokens proved under other keys or another file proves nothing now."""
        self._known = dict(self._policy.keys)

    def _drop_oldest(self) -> None:
        """Of the tokens, those that were checked first."""
        tokens = [name for name, known in self._known.items() if known.kind == "jwt"]
        for name in tokens[: _MAX_REMEMBERED // 4]:
            del self._known[name]

    def _uncredentialed(self, call: Call) -> Known:
        policy = self._policy
        if policy.certificates:
            for name in call.peer_names:
                found = policy.certificates.get(name)
                if found is not None:
                    return found
        if not policy.anonymous.caller.grants.permissions:
            raise CredentialRefused(
                f"no credential was sent: set the metadata `{AUTHORIZATION}: Bearer KEY-OR-TOKEN` or `{API_KEY}: KEY`", "missing"
            )
        return policy.anonymous

    def _expired(self, found: Known) -> Unauthenticated:
        if found.kind == "key":
            return CredentialRefused(f"this API key of {found.caller.principal} has expired; use its successor", "expired")
        return CredentialRefused("the token has expired; get a new one", "expired")


def _credential(metadata: Mapping[str, str | bytes]) -> str:
    """What the call shows; "" where it shows nothing. Raises CredentialRefused for two, and for what is none."""
    given = metadata.get(AUTHORIZATION)
    key = metadata.get(API_KEY)
    if given is None:
        if key is None:
            return ""
        credential = key
    elif key is not None:
        raise CredentialRefused(f"the metadata has both {AUTHORIZATION} and {API_KEY}; send one", "malformed")
    else:
        scheme, _, credential = str(given).partition(" ")
        if scheme.lower() != "bearer":
            raise CredentialRefused(f"the metadata {AUTHORIZATION} must be `Bearer KEY-OR-TOKEN`", "malformed")
        credential = credential.strip()
    if not isinstance(credential, str) or not credential:
        raise CredentialRefused("the credential in the metadata is empty, or no text", "malformed")
    return credential


def _no_such_key(credential: str) -> CredentialRefused:
    if not credential.startswith(PREFIX):
        return CredentialRefused(f"the credential is neither an API key ({PREFIX}…) nor a JSON Web Token", "malformed")
    if not is_whole(credential):
        return CredentialRefused("the API key is not whole: it was cut, or mistyped", "malformed")
    return CredentialRefused("the API key is not known here: it was revoked, or belongs to another mesh", "unknown_key")


async def _change(inotify: Inotify) -> None:
    """Returns some time after the next change."""
    try:
        async with asyncio.timeout(_LOOK_ANYWAY_S):
            await inotify.get()
        await asyncio.sleep(_SETTLE_S)
        async with asyncio.timeout(0):
            while True:
                await inotify.get()
    except TimeoutError:
        return


def _contents(files: tuple[Path, ...]) -> list[bytes | None]:
    return [_content(file) for file in files]


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _folders(files: tuple[Path, ...]) -> set[Path]:
    """Where a change may show: beside a file, and beside what it links to. Kubernetes exchanges a link between the two."""
    return {folder for file in files for folder in (file.parent, file.resolve().parent) if folder.is_dir()}
