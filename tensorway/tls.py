"""TLS: which certificate a process shows, whom it trusts, and who may call what.

Every service of a mesh holds one certificate, signed by the mesh's own authority, whose DNS names include `ROLE.DOMAIN`, such as
`orchestrator.tensorway.internal`. Whoever dials a member checks that name, not the address, for members move; a server reads the caller's
role out of its certificate and refuses methods that are not for that role. Files hold PEM (RFC 7468), a chain as several certificates in
one file; they are read again when they change, so that certificates can be renewed while a process runs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from tensorway.errors import FailedPrecondition, PermissionDenied
from tensorway.registry.port import GATEWAY, GROUP, NODE, ORCHESTRATOR

_LOG = logging.getLogger(__name__)

DEFAULT_DOMAIN: Final = "tensorway.internal"
WORKER: Final = "worker"
#: A person, or what acts for one: the command line, a monitor.
OPERATOR: Final = "operator"
ROLE_OF_KIND: Final = {GATEWAY: GATEWAY, ORCHESTRATOR: ORCHESTRATOR, NODE: WORKER, GROUP: WORKER}
ROLES: Final = (GATEWAY, ORCHESTRATOR, WORKER, OPERATOR)

#: Whoever shows a certificate that is trusted: Consul's agent has one of its own.
ANYBODY: Final = frozenset({"*"})
#: What every member answers to every other: health and reflection; and the operator's own, which gateways pass on. By service name.
OPEN_TO_MEMBERS: Final = {
    "grpc.health.v1.Health": ANYBODY, "grpc.reflection.v1alpha.ServerReflection": frozenset(ROLES),
    "grpc.reflection.v1.ServerReflection": frozenset(ROLES), "tensorway.v1.OpsService": frozenset({GATEWAY, OPERATOR}),
}

#: Files are looked at no more often than this; a handshake that comes in between uses what is known.
_LOOK_S: Final = 1.0

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """PEM contents that fit together. `version` grows with each change."""

    version: int
    ca: bytes
    cert: bytes
    key: bytes
    #: When the certificate ends, seconds since 1970; infinity where there is none.
    expires_s: float


class TlsFiles:
    """Certificate, key and authority on disk. Safe to share between threads: grpc core asks from its own.

    Empty `cert` and `key`: none is shown. Empty `ca`: the system's authorities are trusted. Raises FailedPrecondition where a file cannot
    be read, or key and certificate do not belong together.
    """

    def __init__(self, *, cert: str = "", key: str = "", ca: str = "") -> None:
        if bool(cert) != bool(key):
            raise FailedPrecondition("tls_cert and tls_key go together: set both, or none", field="tls_key" if cert else "tls_cert")
        self._paths = {"tls_cert": cert, "tls_key": key, "tls_ca": ca}
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._refused: _Stamp | None = None
        self._looked_s = time.monotonic()
        self._material = self._read(1)

    @property
    def has_certificate(self) -> bool:
        return bool(self._paths["tls_cert"])

    def material(self) -> TlsMaterial:
        """What holds now. While new files do not fit together (one of them is still to be written) the old contents stay, with a line in
        the log. Never raises."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s >= _LOOK_S:
                self._looked_s = now_s
                self._renew()
            return self._material

    def _renew(self) -> None:
        try:
            stamp = self._look()
            if stamp in (self._stamp, self._refused):
                return
            self._refused = stamp
            self._material = self._read(self._material.version + 1)
            self._stamp = stamp
            _LOG.info("certificates read anew", extra={"fields": {"expires_in_s": round(self._material.expires_s - time.time())}})
        except FailedPrecondition as error:
            _LOG.warning("the certificates that changed are not used: %s", error)

    def _look(self) -> _Stamp:
        stamps = []
        for field, path in self._paths.items():
            if path:
                try:
                    found = os.stat(path)
                except OSError as error:
                    raise FailedPrecondition(f"{field}: {path} cannot be read: {error.strerror}", field=field) from error
                stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
        return tuple(stamps)

    def _read(self, version: int) -> TlsMaterial:
        contents = {}
        for field, path in self._paths.items():
            try:
                contents[field] = Path(path).read_bytes() if path else b""
            except OSError as error:
                raise FailedPrecondition(f"{field}: {path} cannot be read: {error.strerror}", field=field) from error
        expires_s = _check(contents, self._paths)
        return TlsMaterial(version, contents["tls_ca"], contents["tls_cert"], contents["tls_key"], expires_s)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How a server shows itself and whom it lets in."""

    files: TlsFiles
    #: Whether callers must show a certificate that `files` trusts.
    requires_client: bool = True
    #: Roles that may call, by full method name or service name; the longer one counts. What is not named is refused. None: all may.
    callers: Mapping[str, frozenset[str]] | None = None
    domain: str = DEFAULT_DOMAIN

    @property
    def kind(self) -> str:
        """What a registration says of it: `mutual` or `server`."""
        return "mutual" if self.requires_client else "server"

    def check(self, method: str, names: Sequence[str]) -> None:
        """Raises PermissionDenied where a caller with these names may not call `method`."""
        if self.callers is None:
            return
        allowed = self.callers.get(method.removeprefix("/")) or self.callers.get(method.rpartition("/")[0].removeprefix("/")) or frozenset()
        if allowed == ANYBODY:
            return
        if not any(f"{role}.{self.domain}" in names for role in allowed):
            who = ", ".join(names) or "a caller without a certificate"
            needed = " or ".join(f"{role}.{self.domain}" for role in sorted(allowed)) or "nobody"
            raise PermissionDenied(f"{method} is for {needed}, and the certificate shown is of {who}")


@dataclass(frozen=True, slots=True)
class ChannelTls:
    """How a channel shows itself and whom it believes."""

    files: TlsFiles
    #: The name that the server's certificate must have; empty: the dialled host.
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Tls:
    """What a client of the gateway trusts and shows: PEM files. Nothing set: the system's authorities, no certificate. The gateway's
    certificate must have `server_name`, or the dialled host's name. Files are read again when they change."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def channel(self) -> ChannelTls:
        """Raises FailedPrecondition where the files do not serve."""
        return ChannelTls(TlsFiles(cert=self.cert, key=self.key, ca=self.ca), self.server_name)


def channel_tls(wish: Tls | bool) -> ChannelTls | None:
    """True: with the system's authorities. False: in the clear."""
    return (Tls() if wish is True else wish).channel() if wish else None


@dataclass(frozen=True, slots=True)
class MeshTls:
    """One member's TLS: its files and the mesh's domain."""

    files: TlsFiles
    domain: str = DEFAULT_DOMAIN

    def dial(self, kind: str) -> ChannelTls:
        """For a channel to a member, by its kind in the registry."""
        return ChannelTls(self.files, f"{ROLE_OF_KIND[kind]}.{self.domain}")

    def serve(self, callers: Mapping[str, frozenset[str]]) -> ServerTls:
        """For a server within the mesh; see `ServerTls.callers`."""
        return ServerTls(self.files, True, callers, self.domain)


@cache
def open_mesh_tls(cert: str, key: str, ca: str, domain: str) -> MeshTls | None:
    """None where nothing is set. One for the whole process, so that its files are looked at once. Raises FailedPrecondition where some of
    it is missing or unusable."""
    if not (cert or key or ca):
        return None
    for field, path in (("tls_cert", cert), ("tls_key", key), ("tls_ca", ca)):
        if not path:
            raise FailedPrecondition(f"{field} is not set: a member of a mesh with TLS needs tls_cert, tls_key and tls_ca", field=field)
    return MeshTls(TlsFiles(cert=cert, key=key, ca=ca), domain)


def _check(contents: Mapping[str, bytes], paths: Mapping[str, str]) -> float:
    """When the certificate ends. Raises FailedPrecondition where what was read is no PEM, or does not belong together."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    def check(field: str, load: str) -> FailedPrecondition:
        return FailedPrecondition(f"{field}: {paths[field]} holds no {load}", field=field)

    if contents["tls_ca"] or paths["tls_ca"]:
        try:
            x509.load_pem_x509_certificates(contents["tls_ca"])
        except ValueError:
            raise check("tls_ca", "certificates in PEM form") from None
    if not paths["tls_cert"]:
        return float("inf")
    try:
        certificate = x509.load_pem_x509_certificates(contents["tls_cert"])[0]
    except ValueError:
        raise check("tls_cert", "certificate in PEM form") from None
    try:
        key = load_pem_private_key(contents["tls_key"], None)
    except (ValueError, TypeError):
        raise check("tls_key", "private key in PEM form without a password") from None
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*spki) != certificate.public_key().public_bytes(*spki):
        raise FailedPrecondition(f"tls_key: {paths['tls_key']} is not the key of the certificate in {paths['tls_cert']}", field="tls_key")
    return certificate.not_valid_after_utc.timestamp()
