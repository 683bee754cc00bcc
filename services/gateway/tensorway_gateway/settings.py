"""The gateway's configuration."""

from __future__ import annotations

from pydantic import Field, field_validator

from tensorway.access.reading import read_access_file
from tensorway.config import ServiceSettings
from tensorway.deadline import MAX_TIMEOUT_S
from tensorway.errors import FailedPrecondition


class GatewaySettings(ServiceSettings):
    """The gateway: takes client requests in every dialect, checks them and hands them to an orchestrator."""

    listen: str = Field("0.0.0.0:8001", description="gRPC endpoint to bind: host:port (port 0 takes a free one) or unix:path.")
    ops_listen: str = Field("0.0.0.0:8002", description="HTTP endpoint for /healthz, /readyz and /metrics; `off` for none.")
    public_cert: str = Field("", description="PEM file with the certificate that clients see; default: tls_cert.")
    public_key: str = Field("", description="PEM file with the private key of public_cert.")
    client_ca: str = Field("", description="PEM file with authorities; clients must show a certificate of one. Empty: none is asked for.")
    max_in_flight_requests: int = Field(4096, ge=1, description="Most requests at once before RESOURCE_EXHAUSTED.")
    max_in_flight_bytes: int = Field(2 * 1024**3, ge=1, description="Most tensor bytes at once before RESOURCE_EXHAUSTED.")
    max_timeout_s: float = Field(MAX_TIMEOUT_S, gt=0, le=MAX_TIMEOUT_S, description="Longest deadline of a request; a longer one is cut.")
    access_file: str = Field("", description="Who may do what: a YAML file (docs/security.md); empty: everybody may do everything.")
    audit_file: str = Field(
        "", description="Where calls that manage and refused credentials are written, with access_file; empty: the log, as tensorway.audit."
    )
    orchestrator_wait_s: float = Field(5.0, ge=0, description="Seconds that a request waits while no orchestrator is connected.")

    @field_validator("access_file")
    @classmethod
    def _access_file_is_right(cls, value: str) -> str:
        """Every fault in it is told at the start, like every other fault of the settings."""
        if value:
            try:
                read_access_file(value)
            except FailedPrecondition as error:
                raise ValueError(error.message) from None
        return value
