"""The registry URL of Consul: everything that a process has to know of its registry, in one string that holds no secret.

    consul://HOST:PORT[,HOST:PORT…][/PREFIX][?OPTION=VALUE&…]

Several addresses are agents, used one at a time, in this order. `PREFIX` keeps meshes apart that share one Consul.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from tensorway.errors import InvalidRequest

DEFAULT_PREFIX: Final = "tensorway"
_DEFAULT_PORT: Final = 8500
#: A part of service names, which are DNS labels (RFC 1123).
_PREFIX: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_ADDRESS: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_OPTIONS: Final = ("scheme", "ca_file", "cert_file", "key_file", "token_file", "dc", "check")


@dataclass(frozen=True, slots=True)
class Address:
    """Where an agent's HTTP API answers. An IPv6 host has no brackets here."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ConsulUrl:
    """A parsed URL. Files are paths on this machine, "" for none."""

    addresses: tuple[Address, ...]
    prefix: str = DEFAULT_PREFIX
    #: `http` or `https`.
    scheme: str = "http"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    token_file: str = ""
    #: Data centre; "" for the agent's own.
    dc: str = ""
    #: How Consul learns that an owner lives: `grpc`, it asks the endpoint; `ttl`, the owner reports.
    check: str = "grpc"


def parse_consul_url(url: str) -> ConsulUrl:
    """Reads `url`. Raises InvalidRequest with one sentence that names every part that is wrong."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    hosts, slash, prefix = place.partition("/")
    wrong: list[str] = []
    if scheme != "consul":
        wrong.append("it must begin with consul://")
    addresses = tuple(address for word in hosts.split(",") if (address := _address(word, wrong)) is not None)
    prefix = prefix.rstrip("/") if slash and prefix else DEFAULT_PREFIX
    if not _PREFIX.fullmatch(prefix):
        wrong.append(f"the prefix {prefix!r} must be at most 40 of a-z, 0-9 and -, with no - at its ends")
    options = _options(query, wrong)
    parsed = ConsulUrl(addresses, prefix, **options)
    _check_options(parsed, options, wrong)
    if wrong:
        raise InvalidRequest(f"registry {url!r}: {'; '.join(wrong)}", field="registry")
    return parsed


def _address(word: str, wrong: list[str]) -> Address | None:
    found = _ADDRESS.fullmatch(word)
    if found is None:
        wrong.append(f"the address {word!r} must be HOST:PORT")
        return None
    port = int(found["port"] or _DEFAULT_PORT)
    if not 0 < port < 65536:
        wrong.append(f"the port {port} of {word!r} must be from 1 to 65535")
        return None
    return Address(found["host"].strip("[]"), port)


def _options(query: str, wrong: list[str]) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        wrong.append(f"the options {query!r} must be OPTION=VALUE, joined by &")
        return {}
    options: dict[str, str] = {}
    for name, value in pairs:
        if name == "token":
            wrong.append("a token does not belong into a URL, which others can read: put it into a file and name it with token_file")
        elif name not in _OPTIONS:
            wrong.append(f"the option {name!r} is unknown (there are {', '.join(_OPTIONS)})")
        elif name in options:
            wrong.append(f"the option {name!r} is given twice")
        elif not value:
            wrong.append(f"the option {name!r} has no value")
        else:
            options[name] = value
    return options


def _check_options(url: ConsulUrl, options: dict[str, str], wrong: list[str]) -> None:
    if url.scheme not in ("http", "https"):
        wrong.append(f"the scheme {url.scheme!r} must be http or https")
    if url.check not in ("grpc", "ttl"):
        wrong.append(f"the check {url.check!r} must be grpc or ttl")
    if bool(url.cert_file) != bool(url.key_file):
        wrong.append("cert_file and key_file go together")
    if url.scheme == "http":
        wrong += [f"{name} needs scheme=https" for name in ("ca_file", "cert_file", "key_file") if name in options]
