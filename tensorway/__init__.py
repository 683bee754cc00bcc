"""Tensorway: a gRPC-first inference mesh for PyTorch.

`Client` and `AsyncClient` are the public face for callers, `tensorway.model` for model authors. Both are imported lazily, so that
importing the package costs nothing and pulls in neither grpc nor numpy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorway.client import AsyncClient, Client
    from tensorway.explaining import Explain
    from tensorway.results import ChatMessage, Delta, Finished, Started
    from tensorway.tls import Tls

__all__ = ["AsyncClient", "ChatMessage", "Client", "Delta", "Explain", "Finished", "Started", "Tls"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tensorway import client

        return getattr(client, name)
    raise AttributeError(f"module 'tensorway' has no attribute {name!r}")
