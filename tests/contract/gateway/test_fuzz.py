"""Any bytes at any RPC end in OK or in the caller's fault, and nothing invalid goes further than the gateway."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorway.compat import grpc_service_pb2
from tensorway.deadline import Deadline
from tensorway.errors import CallerError, TensorwayError
from tensorway.registry.port import Registration
from tensorway.tensors import ITEM_SIZE, Buffer, DataType, decode_bytes, encode_bytes
from tensorway.transport import AsyncChannel
from tensorway.transport.port import Payload, ReplySink, StreamHandler, UnaryHandler
from tensorway.v1 import inference_pb2, link_pb2, model_pb2, tensor_pb2
from tensorway_gateway.admission import Admission, Limits
from tensorway_gateway.models import Desired, Model, build_models, published_revision
from tensorway_gateway.path import RequestPath
from tensorway_gateway.servicers.inference import InferenceServicer
from tensorway_gateway.servicers.mesh import MeshServicer
from tensorway_gateway.servicers.model import ModelServicer
from tensorway_gateway.servicers.oip import OipServicer
from tensorway_gateway.servicers.oip_models import OipModelServicer
from tensorway_gateway.servicers.oip_unserved import attach_unserved
from tensorway_gateway.statistics import Statistics
from tensorway_gateway.upstream import Orchestrator, Upstream
from tests.contract.gateway.scripted import SPECS, echo_reply, running_mesh

NATIVE = "/tensorway.v1.InferenceService/Infer"
OIP = "/inference.GRPCInferenceService/ModelInfer"
CASES_PER_EXAMPLE = 250


def _raw(name: str, dtype: DataType, shape: Sequence[int]) -> bytes:
    count = prod(shape)
    return encode_bytes([b"word"] * count) if dtype is DataType.BYTES else bytes([1]) * (count * ITEM_SIZE[dtype])


def _valid_messages() -> dict[str, list[bytes]]:
    """Valid requests of every model in both dialects, raw and typed."""
    native: list[bytes] = []
    oip: list[bytes] = []
    request = grpc_service_pb2.ModelInferRequest
    for item in SPECS:
        shapes = [tuple(2 if isinstance(extent, str) else extent for extent in tensor.shape) for tensor in item.signature.inputs]
        pairs = list(zip(item.signature.inputs, shapes, strict=True))
        message = inference_pb2.InferRequest(
            model=item.model, request_id="id", priority=3, output_names=[tensor.name for tensor in item.signature.outputs],
            inputs=[
                tensor_pb2.Tensor(name=tensor.name, dtype=int(tensor.dtype), shape=shape, data=_raw(tensor.name, tensor.dtype, shape))
                for tensor, shape in pairs
            ],
        )
        message.parameters["temperature"].double_value = 0.5
        native.append(message.SerializeToString())
        raw = request(
            model_name=item.model, id="id", outputs=[request.InferRequestedOutputTensor(name=item.signature.outputs[0].name)],
            inputs=[request.InferInputTensor(name=tensor.name, datatype=tensor.dtype.name, shape=shape) for tensor, shape in pairs],
            raw_input_contents=[_raw(tensor.name, tensor.dtype, shape) for tensor, shape in pairs],
        )
        raw.parameters["timeout"].int64_param = 5_000_000
        raw.parameters["priority"].uint64_param = 2
        oip.append(raw.SerializeToString())
    typed = request(model_name="mixed", model_version="1")
    typed.inputs.add(name="a", datatype="INT64", shape=[2, 2]).contents.int64_contents.extend([1, -2, 3, 4])
    typed.inputs.add(name="b", datatype="INT8", shape=[2]).contents.int_contents.extend([-128, 127])
    typed.inputs.add(name="flag", datatype="BOOL").contents.bool_contents.append(True)
    words = request(model_name="words")
    words.inputs.add(name="text", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"ab", b""])
    return {NATIVE: native, OIP: [*oip, typed.SerializeToString(), words.SerializeToString()]}


class CheckingLink:
    """Stands where a connected link would: judges what arrives on its own terms, and echoes it."""

    endpoint = "nowhere"
    is_connected = True
    num_in_flight = 0

    def __init__(self) -> None:
        self.num_arrived = 0

    def send(self, head: bytes, payload: Payload, deadline: Deadline, sink: ReplySink) -> int:
        self.num_arrived += 1
        request = link_pb2.RequestHead.FromString(head)
        _check_arrival(request, payload)
        sink.on_reply(*echo_reply(request, payload))
        return self.num_arrived

    def cancel(self, request_id: int) -> None: ...


def _check_arrival(request: link_pb2.RequestHead, payload: Payload) -> None:
    spec = next(item for item in SPECS if item.model == request.model)
    assert request.revision == spec.revision
    assert sorted(tensor.name for tensor in request.inputs) == sorted(item.name for item in spec.signature.inputs)
    assert [tensor.num_bytes for tensor in request.inputs] == [len(segment) for segment in payload]
    assert -100 <= request.priority <= 100
    extents: dict[str, int] = {}
    for tensor, segment in zip(request.inputs, payload, strict=True):
        wanted = next(item for item in spec.signature.inputs if item.name == tensor.name)
        assert tensor.dtype == wanted.dtype
        for extent, dimension in zip(tensor.shape, wanted.shape, strict=True):
            assert extent >= 0
            assert extent == (dimension if isinstance(dimension, int) else extents.setdefault(dimension, extent))
        _check_segment(wanted.dtype, prod(tensor.shape), segment)
    assert request.rows == (extents["rows"] if spec.signature.is_batchable else 1)
    assert set(request.output_names) <= {item.name for item in spec.signature.outputs}


def _check_segment(dtype: DataType, count: int, segment: Buffer) -> None:
    if dtype is DataType.BYTES:
        assert len(decode_bytes(segment)) == count
    else:
        assert len(segment) == count * ITEM_SIZE[dtype]


class KnownCatalog:
    """The models of SPECS, all ready."""

    def __init__(self) -> None:
        published = {(item.model, item.revision): published_revision(item) for item in SPECS}
        groups = [Registration("group", item.model, "", {"model": item.model, "revision": item.revision}) for item in SPECS]
        self.models: Mapping[str, Model] = build_models([Desired(item.model, item.revision, 1) for item in SPECS], published, groups, [])

    def find(self, name: str) -> Model:
        from tensorway.errors import NotFound

        if name not in self.models:
            raise NotFound("unknown")
        return self.models[name]


class EmptyRegistry:
    async def registrations(self, kind: str) -> tuple[Registration, ...]:
        return ()


class Door:
    """Every handler of the gateway by method, callable without a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, UnaryHandler] = {}
        self.link = CheckingLink()
        upstream = Upstream(None, 0, 0.0, lambda: None)  # type: ignore[arg-type]
        upstream._orchestrators["only"] = Orchestrator("only", self.link)  # type: ignore[arg-type]
        catalog: KnownCatalog = KnownCatalog()
        self.admission = Admission(Limits(10, 1 << 30, 60.0))
        statistics = Statistics()
        path = RequestPath(catalog, self.admission, upstream, statistics)  # type: ignore[arg-type]
        server = self
        InferenceServicer(path).attach(server)  # type: ignore[arg-type]
        OipServicer(path).attach(server)  # type: ignore[arg-type]
        ModelServicer(catalog).attach(server)  # type: ignore[arg-type]
        MeshServicer(EmptyRegistry()).attach(server)  # type: ignore[arg-type]
        OipModelServicer(catalog, statistics, lambda: True).attach(server)  # type: ignore[arg-type]
        attach_unserved(server)  # type: ignore[arg-type]

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        self.handlers[method] = handler

    def add_stream(self, method: str, handler: StreamHandler) -> None: ...

    async def call(self, method: str, message: bytes) -> str:
        """The status. Fails for any other outcome than OK or the caller's fault, and where an invalid request went further."""
        before = self.link.num_arrived
        try:
            await self.handlers[method](message, SilentCall())
        except CallerError as error:
            assert self.link.num_arrived == before, f"{method} {message.hex()}: refused, but it had been sent: {error}"
            assert str(error)
            return error.status.name
        except Exception as error:
            raise AssertionError(f"{method} {message.hex()}: {error!r}") from error
        finally:
            assert (self.admission.num_requests, self.admission.num_bytes) == (0, 0)
        return "OK"


class SilentCall:
    """A call without deadline whose trailers must fit into HTTP/2 headers."""

    deadline = None
    metadata: Mapping[str, str] = {}
    peer = "test"
    method = ""

    def set_trailers(self, trailers: Sequence[tuple[str, str]]) -> None:
        assert all(value.isascii() and value.isprintable() for _, value in trailers)

    def on_cancel(self, callback: object) -> None: ...


def mutate(message: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to four random wounds."""
    found = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(7)
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.randint(1, 8))
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del found[at:end]
        elif kind == 3:
            found[at:at] = found[at:end]
        elif kind == 4:
            found[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 5:
            found[at:] = rng.choice(others)[at:]
        else:
            found[at:end] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    return bytes(found)


_EXTENTS = (0, 1, 2, 2, 2, 3, 4, 8, 9, -1, 2**31, 2**62, -(2**63))


def forge(method: str, rng: random.Random) -> bytes:
    """A message that always parses: right and wrong names, types, shapes and bytes in any mixture."""
    item = rng.choice(SPECS)
    tensors = []
    for wanted in rng.choices(item.signature.inputs, k=rng.choice((1, 1, 3, 4))) if rng.random() < 0.2 else item.signature.inputs:
        shape = [rng.choice(_EXTENTS) if rng.random() < 0.1 else 2 if isinstance(extent, str) else extent for extent in wanted.shape]
        dtype = rng.choice(list(DataType)) if rng.random() < 0.1 else wanted.dtype
        size = prod(max(extent, 0) for extent in shape)
        content = _raw(wanted.name, dtype, [max(extent, 0) for extent in shape]) if size < 1000 and rng.random() < 0.9 else rng.randbytes(rng.randint(0, 40))
        tensors.append((rng.choice((wanted.name, wanted.name, wanted.name, wanted.name, "", "x", "\u2603")), dtype, shape, content))
    model = item.model if rng.random() < 0.95 else rng.choice(("", "nope", "e" * 300))
    revision = rng.choice(("", "", "", item.revision, item.revision[:8], item.revision[:7], "1", "zzzzzzzzz"))
    names = [rng.choice([output.name for output in item.signature.outputs] + ["nope"]) for _ in range(rng.choice((0, 0, 1, 2)))]
    if method == NATIVE:
        return _forge_native(model, revision, tensors, names, rng)
    return _forge_oip(model, revision, tensors, names, rng)


Forged = list[tuple[str, DataType, list[int], bytes]]


def _forge_native(model: str, revision: str, tensors: Forged, names: list[str], rng: random.Random) -> bytes:
    message = inference_pb2.InferRequest(
        model=model, revision=revision, output_names=names, priority=rng.choice((0, 100, -100, 101, -(2**31))),
        request_id=rng.choice(("", "a", "\n", "\u2603" * 200, "i" * 600)),
        inputs=[tensor_pb2.Tensor(name=name, dtype=int(dtype), shape=shape, data=data) for name, dtype, shape, data in tensors],
    )
    if rng.random() < 0.1:
        message.parameters["p"].SetInParent()
    return message.SerializeToString()


def _forge_oip(model: str, revision: str, tensors: Forged, names: list[str], rng: random.Random) -> bytes:
    message = grpc_service_pb2.ModelInferRequest(model_name=model, model_version=revision, id=rng.choice(("", "a", "\n", "i" * 600)))
    is_raw = rng.random() < 0.6
    lists = [field.name for field in grpc_service_pb2.InferTensorContents.DESCRIPTOR.fields]
    for name, dtype, shape, data in tensors:
        item = message.inputs.add(name=name, datatype=dtype.name if rng.random() < 0.95 else rng.choice(("", "FP8")), shape=shape)
        if is_raw or rng.random() < 0.05:
            message.raw_input_contents.append(data)
        if not is_raw or rng.random() < 0.05:
            values = getattr(item.contents, rng.choice(lists))
            kind = bytes if values is item.contents.bytes_contents else int
            values.extend([kind(1)] * min(1000, max(0, prod(shape))))
        if rng.random() < 0.05:
            item.parameters[rng.choice(("shared_memory_region", "classification", "any"))].string_param = "r"
    for name in names:
        message.outputs.add(name=name)
    if rng.random() < 0.3:
        parameter = message.parameters[rng.choice(("priority", "timeout", "sequence_id", "headers", "triton_x", "own"))]
        kind = rng.choice(("bool_param", "int64_param", "uint64_param", "string_param", "double_param", ""))
        if kind == "":
            parameter.SetInParent()
        else:
            values = {"bool_param": True, "string_param": "s", "double_param": float("nan")}
            setattr(parameter, kind, values.get(kind, rng.choice((0, 1, 5_000_000, 2**63 - 1))))
    return message.SerializeToString()


@pytest.fixture(scope="module")
def door() -> Door:
    return Door()


@pytest.mark.parametrize("method", [NATIVE, OIP])
def test_valid_requests_pass(door: Door, method: str) -> None:
    for message in VALID[method]:
        assert asyncio.run(door.call(method, message)) == "OK"


VALID = _valid_messages()
_FUZZ = settings(max_examples=240, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("method", [NATIVE, OIP])
@given(seed=st.integers(0, 2**63 - 1))
@_FUZZ
def test_wounded_requests_are_the_callers_fault_or_fine(door: Door, method: str, seed: int) -> None:
    """60 000 cases a dialect."""
    rng = random.Random(seed)

    async def run() -> None:
        for _ in range(CASES_PER_EXAMPLE):
            await door.call(method, mutate(rng.choice(VALID[method]), VALID[method], rng))

    asyncio.run(run())


@pytest.mark.parametrize("method", [NATIVE, OIP])
@given(seed=st.integers(0, 2**63 - 1))
@_FUZZ
def test_forged_requests_are_the_callers_fault_or_fine(door: Door, method: str, seed: int) -> None:
    """60 000 cases a dialect, all of which get past the parser."""
    rng = random.Random(seed)

    async def run() -> None:
        for _ in range(CASES_PER_EXAMPLE):
            await door.call(method, forge(method, rng))

    asyncio.run(run())


@given(message=st.binary(max_size=200), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_noise_at_every_rpc_is_the_callers_fault_or_fine(door: Door, message: bytes, seed: int) -> None:
    """Every RPC gets each message and a few of pure noise: about 30 000 cases."""
    rng = random.Random(seed)

    async def run() -> None:
        for method in door.handlers:
            await door.call(method, message)
            for _ in range(6):
                await door.call(method, rng.randbytes(rng.randint(0, 64)))

    asyncio.run(run())


def test_the_fuzz_reaches_both_sides_of_the_door(door: Door) -> None:
    """The wounds are neither all fatal nor all harmless: otherwise the tests above would prove nothing."""
    rng = random.Random(1)

    async def run(method: str, is_forged: bool) -> Counter[str]:
        messages = [forge(method, rng) if is_forged else mutate(rng.choice(VALID[method]), VALID[method], rng) for _ in range(2000)]
        return Counter([await door.call(method, message) for message in messages])

    for method in (NATIVE, OIP):
        for is_forged in (False, True):
            found = asyncio.run(run(method, is_forged))
            assert found["OK"] > 50
            assert found["INVALID_ARGUMENT"] > 500
            assert found["NOT_FOUND"] > 5


@pytest.mark.parametrize("implementation", ["completion-queue", "aio"])
async def test_the_same_over_the_wire(tmp_path: Path, implementation: str) -> None:
    rng = random.Random(2)
    sent = Counter[str]()
    async with running_mesh(tmp_path, implementation=implementation) as mesh:
        channel = AsyncChannel(mesh.endpoint)
        try:
            for _ in range(400):
                method = rng.choice((NATIVE, OIP))
                wounded = mutate(rng.choice(VALID[method]), VALID[method], rng)
                message = rng.choice((wounded, forge(method, rng), rng.randbytes(rng.randint(0, 99))))
                sent[await _status(channel, method, message)] += 1
        finally:
            await channel.close()
        assert set(sent) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
        assert len(mesh.orchestrators[0].heads) == sent["OK"]
        for head in mesh.orchestrators[0].heads:
            assert head.revision


async def _status(channel: AsyncChannel, method: str, message: bytes) -> str:
    try:
        await channel.unary(method, message, 10.0)
    except TensorwayError as error:
        return error.status.name
    return "OK"


def test_every_rpc_of_both_dialects_is_answered(door: Door) -> None:
    oip = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    wanted = {f"/{oip.full_name}/{method.name}" for method in oip.methods} - {f"/{oip.full_name}/ModelStreamInfer"}
    for module in (inference_pb2, model_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            wanted |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert wanted <= door.handlers.keys()
