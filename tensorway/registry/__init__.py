"""The registry: one port, adapters chosen by URL."""

from __future__ import annotations

from tensorway.errors import InvalidRequest
from tensorway.registry.port import Registry

__all__ = ["open_registry"]


def open_registry(url: str) -> Registry:
    """The registry at `url` (`directory:PATH`). Raises InvalidRequest for a scheme that nothing here speaks."""
    scheme, _, rest = url.partition(":")
    if scheme == "directory" and rest:
        from tensorway.registry.directory import DirectoryRegistry

        return DirectoryRegistry(rest)
    raise InvalidRequest(f"registry {url!r}: expected directory:PATH", field="registry")
