"""The RPCs of the protocol that are not served here: each says what to use instead, so that no caller has to guess."""

from __future__ import annotations

from typing import Final, NoReturn

from tensorway.errors import Unimplemented
from tensorway.transport.port import Call, Server
from tensorway_gateway.servicers.oip import SERVICE

_LOADING: Final = (
    "models are loaded by the mesh from model directories; start a worker with --models-dir, or change what the registry says is wanted"
)
_SHARED_MEMORY: Final = "shared memory is not served here; send the tensor's bytes in the message"
_INSTEAD: Final = {
    "RepositoryModelLoad": _LOADING,
    "RepositoryModelUnload": _LOADING,
    "SystemSharedMemoryStatus": _SHARED_MEMORY,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _SHARED_MEMORY,
    "CudaSharedMemoryStatus": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryUnregister": _SHARED_MEMORY,
    "TraceSetting": "tracing is configured when the services start, not by RPC; read the tensorway-timing trailer for one request's times",
    "LogSettings": "logging is configured when the services start; set --log-level or TENSORWAY_LOG_LEVEL",
}


def attach_unserved(server: Server) -> None:
    """Adds an UNIMPLEMENTED answer for each of them."""
    for rpc, instead in _INSTEAD.items():
        _refuse(server, rpc, instead)


def _refuse(server: Server, rpc: str, instead: str) -> None:
    async def refuse(message: bytes, call: Call) -> NoReturn:
        raise Unimplemented(f"{rpc}: {instead}")

    server.add_unary(f"/{SERVICE}/{rpc}", refuse)
