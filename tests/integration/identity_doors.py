"""Two gateways of a mesh that ask who calls, one of which asks for certificates too; and calls as somebody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tensorway import AsyncClient, Tls
from tensorway.compat import grpc_service_pb2 as oip
from tensorway.registry.port import GATEWAY
from tensorway.tensors import DataType
from tensorway.tls import OPERATOR
from tensorway.v1 import inference_pb2, mesh_pb2, model_pb2
from tests.contract.gateway.identities import AccessFile, call, issuer_rule, write_key_set
from tests.integration.conftest import Mesh

KEYED, CERTIFIED = "gateway-keyed", "gateway-certified"
MODEL, OTHER = "chain", "other"
V1, OIP = "/tensorway.v1.", "/inference.GRPCInferenceService/"
_SOON_S = 20.0


def _infer() -> bytes:
    request = inference_pb2.InferRequest(model=MODEL)
    request.inputs.add(name="x", dtype=DataType.FP32, shape=[1, 2], data=bytes(8))  # type: ignore[arg-type]
    return request.SerializeToString()


def _oip_infer() -> bytes:
    request = oip.ModelInferRequest(model_name=MODEL, raw_input_contents=[bytes(8)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    return request.SerializeToString()


#: What one may do here: a method, and a message to it.
DEEDS: dict[str, tuple[str, bytes]] = {
    "infer": (f"{V1}InferenceService/Infer", _infer()),
    "oip": (f"{OIP}ModelInfer", _oip_infer()),
    "oip stream": (f"{OIP}ModelStreamInfer", _oip_infer()),
    "see": (f"{V1}ModelService/GetModel", model_pb2.GetModelRequest(name=MODEL).SerializeToString()),
    "scale": (f"{V1}ModelService/ScaleModel", model_pb2.ScaleModelRequest(model=MODEL, replicas=1).SerializeToString()),
    "scale other": (f"{V1}ModelService/ScaleModel", model_pb2.ScaleModelRequest(model=OTHER, replicas=0).SerializeToString()),
    "topology": (f"{V1}MeshService/GetTopology", b""),
    "profile": (f"{V1}MeshService/Profile", mesh_pb2.ProfileRequest(model=MODEL).SerializeToString()),
    "log level": (
        f"{V1}MeshService/SetMemberLogLevel", mesh_pb2.SetMemberLogLevelRequest(level="info", members=["node-1"]).SerializeToString(),
    ),
    "reflection": ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x3a\x00"),
    "health": ("/grpc.health.v1.Health/Check", b""),
}


@dataclass
class Doors:
    """The two gateways, and what they know."""

    mesh: Mesh
    access: AccessFile
    #: By id.
    endpoints: Mapping[str, str]
    _channels: dict[tuple[str, str], grpc.aio.Channel] = field(default_factory=dict)

    def key_file(self, name: str) -> Path:
        """The key of that name, as the command line takes it."""
        path = self.access.path.with_name(f"{name}.key")
        path.write_text(self.access.keys[name])
        return path

    def client(self, name: str, **more: Any) -> AsyncClient:
        """A client with the key of that name, of the gateway that asks for no certificate."""
        return AsyncClient(self.endpoints[KEYED], tls=self.mesh.tls, api_key=self.access.keys[name], **more)

    def operator(self, **more: Any) -> AsyncClient:
        """A client with an operator's certificate, of the gateway that asks for one."""
        return AsyncClient(self.endpoints[CERTIFIED], tls=self.tls(OPERATOR), **more)

    def tls(self, role: str) -> Tls:
        assert self.mesh.certs is not None
        own = self.mesh.certs / role
        return Tls(ca=str(self.mesh.certs / "ca.pem"), cert=f"{own}.pem", key=f"{own}.key")

    async def done(self, deed: str, credential: str = "", role: str = "") -> str:
        """What becomes of a deed: the status' name. With a role, its certificate is shown to the gateway that asks for one."""
        method, message = DEEDS[deed]
        status, answer, sentence = await call(self._channel(role), method, message, credential)
        if deed == "oip stream" and status == "OK":
            said = oip.ModelStreamInferResponse.FromString(answer).error_message
            return "PERMISSION_DENIED" if " may not " in said else said or status
        assert status == "OK" or sentence, f"{deed}: {status} without a sentence"
        return status

    def audit(self, gateway: str) -> list[dict[str, Any]]:
        """What that gateway has written down so far."""
        path = self._audit_file(gateway)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    async def written(self, gateway: str, *lines: tuple[str, str, str, str]) -> None:
        """Returns once these have been: principal, method without its service, model, and outcome."""
        ends_s = asyncio.get_running_loop().time() + _SOON_S
        while missing := set(lines) - {
            (line["principal"], line["method"].rpartition("/")[2], line["model"], line["outcome"]) for line in self.audit(gateway)
        }:
            assert asyncio.get_running_loop().time() < ends_s, missing
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    def _audit_file(self, gateway: str) -> Path:
        return self.access.path.with_name(f"{gateway}.jsonl")

    def _channel(self, role: str) -> grpc.aio.Channel:
        gateway = CERTIFIED if role else KEYED
        known = self._channels.get((gateway, role))
        if known is None:
            certs = self.mesh.certs
            assert certs is not None
            own = ((certs / f"{role}.key").read_bytes(), (certs / f"{role}.pem").read_bytes()) if role else ()
            credentials = grpc.ssl_channel_credentials((certs / "ca.pem").read_bytes(), *own)
            known = self._channels[gateway, role] = grpc.aio.secure_channel(self.endpoints[gateway], credentials)
        return known


@asynccontextmanager
async def doors_of(mesh: Mesh, folder: Path) -> AsyncIterator[Doors]:
    """Starts the two, in a mesh with certificates that serves MODEL."""
    access = AccessFile(folder)
    access.add("web", f"infer:{MODEL}")
    access.add("leaving", f"infer:{MODEL}")
    access.add("slow", f"infer:{MODEL}", quota="slow")
    access.add("ops", "manage", "observe")
    access.add("team", f"infer:{OTHER}", f"manage:{OTHER}")
    write_key_set(folder / "jwks.json")
    scopes = {"mesh.use": [f"infer:{MODEL}"], "mesh.run": [f"manage:{OTHER}", "observe"]}
    access.write(
        issuers=[issuer_rule(scopes=scopes)], quotas={"slow": {"requests_per_s": 5, "burst": 1}},
        certificates=[{"name": "operator.tensorway.internal", "allow": ["manage", "observe"]}],
    )
    assert mesh.certs is not None
    settings: dict[str, Any] = {"access_file": access.path}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(mesh.start(KEYED, "gateway", **settings, audit_file=folder / f"{KEYED}.jsonl"))
        tasks.create_task(
            mesh.start(CERTIFIED, "gateway", **settings, audit_file=folder / f"{CERTIFIED}.jsonl", client_ca=mesh.certs / "ca.pem")
        )
    await mesh.wait_members(GATEWAY, 3)
    doors = Doors(mesh, access, {member.id: member.endpoint for member in await mesh.members(GATEWAY)})
    try:
        # Registered is not yet connected to the orchestrators.
        for client in (doors.client("web", retries=20), doors.operator(retries=20)):
            async with client, asyncio.timeout(_SOON_S):
                while not await client.is_ready():
                    await asyncio.sleep(0.02)
        yield doors
    finally:
        await doors.close()


def is_right(sent: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> bool:
    """Whether MODEL, or OTHER, which is the same, answered this to that."""
    return np.array_equal(got, sent + 2)
