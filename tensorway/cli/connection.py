"""How the command line reaches a mesh: certificates and credentials, the same for every command.

They are options of `tensorway` itself (`tensorway --tls-ca ca.pem models`), or the environment: set once, they hold for all commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorway.client_credentials import credentials_of
from tensorway.errors import FailedPrecondition

if TYPE_CHECKING:
    from tensorway.client import AsyncClient, Client
    from tensorway.tls import ChannelTls, Tls


@dataclass(slots=True)
class Connection:
    """What was given."""

    uses_tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""
    domain: str = ""
    api_key_file: str = ""
    api_key: str = ""

    def tls(self) -> Tls | bool:
        """For a client of the gateway. False: in the clear."""
        from tensorway.tls import Tls

        if not (self.uses_tls or self.ca or self.cert):
            return False
        return Tls(ca=self.ca, cert=self.cert, key=self.key, server_name=self.server_name)

    def member_tls(self, kind: str) -> ChannelTls | None:
        """For a channel to a member itself, whose authority alone is not enough: members ask for an operator's certificate."""
        from tensorway.tls import open_mesh_tls

        if not (self.uses_tls or self.ca or self.cert):
            return None
        mesh = open_mesh_tls(self.cert, self.key, self.ca, self.domain)
        return None if mesh is None else mesh.dial(kind)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The credential that goes with every call."""
        if not self.api_key_file:
            return credentials_of(self.api_key, "")()
        try:
            key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise FailedPrecondition(f"--api-key-file: {self.api_key_file} cannot be read: {error}", field="api_key_file") from error
        return credentials_of(key, "")()


_given = Connection()


def given() -> Connection:
    """What this command was started with."""
    return _given


def connect(endpoint: str, **settings: Any) -> Client:
    """A client of the gateway at `endpoint`, with what was given."""
    from tensorway.client import Client

    return Client(endpoint, tls=_given.tls(), metadata=_given.metadata(), **settings)


def connect_async(endpoint: str, **settings: Any) -> AsyncClient:
    """The same for asyncio."""
    from tensorway.client import AsyncClient

    return AsyncClient(endpoint, tls=_given.tls(), metadata=_given.metadata(), **settings)


def take(
    tls: Annotated[bool, typer.Option("--tls", envvar="TENSORWAY_TLS", help="Talk TLS, and trust the system's authorities.")] = False,
    tls_ca: Annotated[
        str, typer.Option(envvar="TENSORWAY_TLS_CA", help="PEM file with the authorities to trust instead; implies --tls.")
    ] = "",
    tls_cert: Annotated[str, typer.Option(envvar="TENSORWAY_TLS_CERT", help="PEM file with a certificate to show.")] = "",
    tls_key: Annotated[str, typer.Option(envvar="TENSORWAY_TLS_KEY", help="PEM file with its private key.")] = "",
    tls_server_name: Annotated[
        str, typer.Option(envvar="TENSORWAY_TLS_SERVER_NAME", help="Name in the gateway's certificate, if not the dialled host.")
    ] = "",
    tls_domain: Annotated[
        str, typer.Option(envvar="TENSORWAY_TLS_DOMAIN", help="Domain of the mesh's members, for commands that reach them directly.")
    ] = "tensorway.internal",
    api_key_file: Annotated[
        str, typer.Option(envvar="TENSORWAY_API_KEY_FILE", help="File with the API key or token that goes with every call.")
    ] = "",
    # Hidden: on the command line everybody on the machine would read it; the variable is what is meant.
    api_key: Annotated[str, typer.Option(hidden=True, envvar="TENSORWAY_API_KEY")] = "",
) -> None:
    """A gRPC-first inference mesh for PyTorch. Start with `tensorway up MODELS_DIR`."""
    _given.uses_tls, _given.ca, _given.cert, _given.key = tls, tls_ca, tls_cert, tls_key
    _given.server_name, _given.domain, _given.api_key_file = tls_server_name, tls_domain, api_key_file
    _given.api_key = api_key
