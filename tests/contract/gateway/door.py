"""All handlers of the gateway without a server, and a link that judges what gets through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from tensorway.deadline import Deadline
from tensorway.errors import CallerError, NotFound
from tensorway.registry.port import Registration
from tensorway.tensors import ITEM_SIZE, Buffer, DataType, decode_bytes
from tensorway.transport.port import Payload, ReplySink, StreamHandler, UnaryHandler
from tensorway.v1 import link_pb2
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
from tests.contract.gateway.forging import VALID
from tests.contract.gateway.scripted import SPECS, echo_reply


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
            status = "OK"
        except CallerError as error:
            status = error.status.name
        except Exception as error:
            raise AssertionError(f"{method} {message.hex()}: {error!r}") from error
        was_sent = self.link.num_arrived > before
        assert was_sent is (status == "OK" and method in VALID), f"{method} {message.hex()}: {status}, and sent: {was_sent}"
        assert (self.admission.num_requests, self.admission.num_bytes) == (0, 0)
        return status


class SilentCall:
    """A call without deadline whose trailers must fit into HTTP/2 headers."""

    deadline = None
    metadata: Mapping[str, str] = {}
    peer = "test"
    method = ""

    def set_trailers(self, trailers: Sequence[tuple[str, str]]) -> None:
        assert all(value.isascii() and value.isprintable() for _, value in trailers)

    def on_cancel(self, callback: object) -> None: ...
