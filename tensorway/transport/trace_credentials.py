"""Credentials of the channel that OpenTelemetry's exporter opens: its library takes grpcio's own objects."""

from __future__ import annotations

import grpc


def root_credentials(roots: bytes) -> grpc.ChannelCredentials:
    """TLS that trusts the authorities in `roots`, PEM."""
    return grpc.ssl_channel_credentials(root_certificates=roots)
