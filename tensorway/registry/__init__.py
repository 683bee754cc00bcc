"""The registry: one port, adapters chosen by URL."""

from __future__ import annotations

from tensorway.errors import InvalidRequest
from tensorway.registry.port import Registry

__all__ = ["open_registry"]


def open_registry(url: str) -> Registry:
    """The registry at `url`: `directory:PATH`, or `consul://HOST:PORT/PREFIX` (see `consul_url`). Raises InvalidRequest for others."""
    scheme, _, rest = url.partition(":")
    if scheme == "directory" and rest:
        from tensorway.registry.directory import DirectoryRegistry

        return DirectoryRegistry(rest)
    if scheme == "consul":
        from tensorway.registry.consul import ConsulRegistry

        return ConsulRegistry(url)
    raise InvalidRequest(f"registry {url!r}: expected directory:PATH or consul://HOST:PORT", field="registry")
