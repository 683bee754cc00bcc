"""TLS of the ops port, and when certificates end."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tensorway.errors import FailedPrecondition
from tensorway.tls import MeshTls, TlsFiles, TlsMaterial

OFF: Final = "off"
MUTUAL: Final = "mtls"


def ops_context(wish: str, tls: MeshTls | None) -> ssl.SSLContext | None:
    """The context for the setting `ops_tls`, which follows the files of `tls`. None: in the clear. Raises FailedPrecondition where there
    is no certificate to show."""
    if wish == OFF:
        return None
    if tls is None:
        raise FailedPrecondition(f"ops_tls is {wish!r} and there is no certificate; set tls_cert, tls_key and tls_ca", field="ops_tls")
    is_mutual = wish == MUTUAL
    files = tls.files
    known = files.material()
    context = _context(known, is_mutual)

    def renew(connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext) -> None:
        """Called at each handshake, with or without a server name (RFC 6066)."""
        nonlocal known, context
        material = files.material()
        if material.version != known.version:
            known, context = material, _context(material, is_mutual)
        connection.context = context

    first = context
    first.sni_callback = renew
    return first


class CertificateCollector(Collector):
    """When this process's certificate ends."""

    def __init__(self, files: TlsFiles, metrics: CollectorRegistry) -> None:
        self._files = files
        metrics.register(self)

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "tensorway_tls_certificate_expiry_timestamp_seconds", "When this process's certificate ends, seconds since 1970.",
            value=self._files.material().expires_s,
        )


def _context(material: TlsMaterial, is_mutual: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The standard library takes a certificate from files alone; these are private and gone at once.
    with tempfile.TemporaryDirectory(prefix="tensorway-") as folder:
        cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
        cert.write_bytes(material.cert)
        key.write_bytes(material.key)
        context.load_cert_chain(cert, key)
    if is_mutual:
        context.load_verify_locations(cadata=material.ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context
