"""Configuration: read once at the start, from a file, then the environment, then flags (later wins), into a frozen model.

Every setting `some_name` is the flag `--some-name`, the variable `TENSORWAY_SOME_NAME` and the key `some_name` of the YAML file given with
`--config` or `TENSORWAY_CONFIG`. All bad fields are reported together, and the process exits with status 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from tensorway.telemetry.tracing import TraceSettings
from tensorway.tls import DEFAULT_DOMAIN, MeshTls, open_mesh_tls
from tensorway.transport.port import DEFAULT_MAX_MESSAGE_BYTES

ENV_PREFIX = "TENSORWAY_"


def default_run_dir() -> Path:
    """Where a mesh on this machine keeps its registry and logs: under the user's runtime directory, private and gone at reboot."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/tensorway-{os.getuid()}") / "tensorway"


def default_registry() -> str:
    """The registry that every service and command on this machine meets in unless told otherwise."""
    return f"directory:{default_run_dir() / 'registry'}"


class ServiceSettings(BaseSettings):
    """What every service has."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", cli_kebab_case=True, cli_hide_none_type=True, cli_avoid_json=True,
        use_attribute_docstrings=True,
    )

    listen: str = Field("127.0.0.1:0", description="gRPC endpoint to bind: host:port (port 0 takes a free one) or unix:path.")
    advertise_host: str = Field("", description="Host that others dial; default: the bound host, or this machine's name for 0.0.0.0.")
    ops_listen: str = Field("127.0.0.1:0", description="HTTP endpoint for /healthz, /readyz and /metrics; `off` for none.")
    registry: str = Field(
        default_factory=default_registry, description="Registry: directory:PATH, or consul://HOST:PORT/PREFIX (docs/registry.md)."
    )
    id: str = Field("", description="Name of this instance, unique in the mesh; default: made from host and process id.")
    zone: str = Field("", description="Where this instance runs, e.g. a rack or an availability zone; near groups are preferred.")
    transport: Literal["completion-queue", "aio"] = Field(
        "completion-queue", description="gRPC server implementation: the fast one, or grpc.aio's portable one."
    )
    tls_cert: str = Field("", description="PEM file with this member's certificate; empty: the mesh talks in the clear (docs/security.md).")
    tls_key: str = Field("", description="PEM file with the certificate's private key, without a password.")
    tls_ca: str = Field("", description="PEM file with the authorities that sign the certificates of the mesh's members.")
    tls_domain: str = Field(DEFAULT_DOMAIN, min_length=1, description="Domain of the members' names: a certificate says ROLE.DOMAIN.")
    ops_tls: Literal["off", "tls", "mtls"] = Field(
        "off", description="The ops port in the clear, over TLS with tls_cert, or only for callers whose certificate tls_ca signed."
    )
    local_links: bool = Field(True, description="Links within this machine take a local socket, not gRPC: less CPU, lower latency.")
    max_message_bytes: int = Field(DEFAULT_MAX_MESSAGE_BYTES, ge=4 * 1024 * 1024, le=2**31 - 1, description="Largest gRPC message, bytes.")
    drain_delay_s: float = Field(
        0.0, ge=0, description="Seconds after SIGTERM in which new requests are still taken, so that proxies see first that it leaves."
    )
    grace_s: float = Field(30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line shown.")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="json, text, or text on a terminal and json elsewhere.")
    trace_endpoint: str = Field(
        "", description="OTLP/gRPC receiver of traces: host:port, or https://host:port for TLS; empty: no tracing (docs/tracing.md)."
    )
    trace_sample: float = Field(0.0, ge=0, le=1, description="Share of requests traced of those that come without a traceparent.")
    trace_ca_file: str = Field("", description="PEM file of the authority that signed the receiver's certificate; default: the system's.")
    trace_headers_file: str = Field("", description="File of `name: value` lines that go with every export, e.g. a token.")

    @property
    def mesh_tls(self) -> MeshTls | None:
        """None: in the clear. Raises FailedPrecondition where the files do not serve."""
        return open_mesh_tls(self.tls_cert, self.tls_key, self.tls_ca, self.tls_domain)

    @property
    def tracing(self) -> TraceSettings:
        """What concerns traces."""
        return TraceSettings(self.trace_endpoint, self.trace_sample, self.trace_ca_file, self.trace_headers_file)


SettingsT = TypeVar("SettingsT", bound=BaseSettings)


class _FileSource(PydanticBaseSettingsSource):
    """Values of the YAML file, the weakest source."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def load_settings(settings: type[SettingsT], argv: list[str], prog: str) -> SettingsT:
    """The settings, or a list of all that is wrong on standard error and exit status 2."""
    argv, config_path = _take_config_flag(argv)
    values = _read_file(config_path, prog) if config_path else {}

    class WithFile(settings):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, _FileSource(settings_cls, values)

    WithFile.__doc__ = f"{settings.__doc__ or ''} Also: --config FILE (YAML with the same names, _ for -)."
    try:
        return WithFile(_cli_parse_args=argv, _cli_prog_name=prog)
    except SettingsError as error:
        print(f"{prog}: {error}; a list is written as JSON, e.g. [\"a\",\"b\"]", file=sys.stderr)
        raise SystemExit(2) from None
    except ValidationError as error:
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"]) or "settings"
            given = f" (got {item['input']!r})" if "input" in item else ""
            print(f"{prog}: {name}: {item['msg']}{given}; set --{name.replace('_', '-')} or {ENV_PREFIX}{name.upper()}", file=sys.stderr)
        raise SystemExit(2) from None


def _take_config_flag(argv: list[str]) -> tuple[list[str], str]:
    """`argv` without `--config FILE`, and that file (or the one the environment names)."""
    rest: list[str] = []
    path = os.environ.get(f"{ENV_PREFIX}CONFIG", "")
    words = iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, "")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, path


def _read_file(path: str, prog: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"{prog}: --config {path}: cannot be read: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if not isinstance(document, dict):
        print(f"{prog}: --config {path}: must be a mapping of setting names to values", file=sys.stderr)
        raise SystemExit(2)
    return document
