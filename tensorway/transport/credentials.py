"""grpc's credentials out of our files, for both servers and all channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import grpc
from grpc._cython import cygrpc

from tensorway.tls import ChannelTls, ServerTls, TlsMaterial

#: What core calls the DNS, URI and IP names of a verified certificate in an auth context.
_NAMES: Final = "x509_subject_alternative_name"


class _Reloading:
    """Tells core before each handshake whether the certificate has changed. Called from core's threads."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        material = tls.files.material()
        self._version = material.version
        self.first: Final = _configuration(material, tls.requires_client)

    def __call__(self) -> Any:
        material = self._tls.files.material()
        if material.version == self._version:
            return None
        self._version = material.version
        return _configuration(material, self._tls.requires_client)


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow the files."""
    reloading = _Reloading(tls)
    return grpc.dynamic_ssl_server_credentials(reloading.first, reloading, require_client_authentication=tls.requires_client)


def core_server_credentials(tls: ServerTls) -> Any:
    """The same, as core itself takes them."""
    credentials: Any = server_credentials(tls)
    return credentials._credentials


def channel_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Credentials of one version of the files: a channel keeps what it was made with."""
    return grpc.ssl_channel_credentials(material.ca or None, material.key or None, material.cert or None)


def channel_arguments(tls: ChannelTls | None) -> tuple[tuple[str, str], ...]:
    """Channel arguments beyond the credentials."""
    return (("grpc.ssl_target_name_override", tls.server_name),) if tls is not None and tls.server_name else ()


def aio_channel(endpoint: str, tls: ChannelTls | None, options: Any) -> Any:
    """A grpc.aio channel, in the clear where `tls` is None."""
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, options=options)
    return grpc.aio.secure_channel(endpoint, channel_credentials(tls.files.material()), options=(*options, *channel_arguments(tls)))


def blocking_channel(endpoint: str, tls: ChannelTls | None, options: Any) -> Any:
    """The same for threads."""
    if tls is None:
        return grpc.insecure_channel(endpoint, options=options)
    return grpc.secure_channel(endpoint, channel_credentials(tls.files.material()), options=(*options, *channel_arguments(tls)))


def peer_names(context: Mapping[Any, Any]) -> tuple[str, ...]:
    """DNS, URI and IP names of the verified client certificate in an auth context; () where none was shown."""
    found = context.get(_NAMES) or context.get(_NAMES.encode()) or ()
    return tuple(name.decode("utf-8", "replace") for name in found)


def core_peer_names(call: Any) -> tuple[str, ...]:
    """The same of core's own call."""
    return peer_names(cygrpc.auth_context(call))


def _configuration(material: TlsMaterial, requires_client: bool) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca if requires_client else None)
