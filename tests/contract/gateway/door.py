"""All handlers of the gateway without a server, and a link that judges what gets through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from tensorway.compat import grpc_service_pb2
from tensorway.deadline import Deadline
from tensorway.errors import CallerError, NotFound
from tensorway.registry.port import Registration
from tensorway.tensors import ITEM_SIZE, Buffer, DataType, decode_bytes
from tensorway.transport.port import Payload, ReplySink, StreamHandler, UnaryHandler
from tensorway.v1 import link_pb2
from tensorway_gateway.admission import Admission, Limits
from tensorway_gateway.generation_path import GenerationPath
from tensorway_gateway.models import Desired, Model, build_models, published_revision
from tensorway_gateway.path import RequestPath
from tensorway_gateway.servicers.generation import GenerationServicer
from tensorway_gateway.servicers.inference import InferenceServicer
from tensorway_gateway.servicers.mesh import MeshServicer
from tensorway_gateway.servicers.model import ModelServicer
from tensorway_gateway.servicers.oip import OipServicer
from tensorway_gateway.servicers.oip_models import OipModelServicer
from tensorway_gateway.servicers.oip_stream import OipStreamServicer
from tensorway_gateway.servicers.oip_unserved import attach_unserved
from tensorway_gateway.statistics import Statistics
from tensorway_gateway.upstream import Orchestrator, Upstream
from tests.contract.gateway.forging import DOOR_SPECS, OIP_STREAM, VALID
from tests.contract.gateway.scripted import echo_reply
from tests.contract.gateway.streaming import answer_of


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
        if request.HasField("generate"):
            _check_generation(request, payload)
            for message in answer_of(3):
                sink.on_token(message)  # type: ignore[attr-defined]
            sink.on_reply(b"", ())
        else:
            _check_arrival(request, payload)
            sink.on_reply(*echo_reply(request, payload, DOOR_SPECS))
        return self.num_arrived

    def cancel(self, request_id: int) -> None: ...

    def grant(self, request_id: int, num_tokens: int) -> None: ...


def _check_generation(request: link_pb2.RequestHead, payload: Payload) -> None:
    """What a leader may rely on."""
    asked = request.generate
    assert payload == ()
    assert request.rows == 1
    assert request.request_id
    assert -100 <= request.priority <= 100
    prompt = asked.WhichOneof("prompt")
    if prompt == "resume":
        assert (request.model, request.revision) == ("", "")
        assert asked.resume.stream_id
        assert {field.name for field, _ in asked.ListFields()} <= {"resume", "request_id"}
        return
    assert request.revision == next(item for item in DOOR_SPECS if item.model == request.model and item.generation).revision
    assert {"text": asked.text, "token_ids": asked.token_ids.ids, "chat": asked.chat.messages}[prompt or ""]
    assert all(message.role for message in asked.chat.messages)
    sampling, stop = asked.sampling, asked.stop
    assert 0 <= sampling.temperature <= 100
    assert 0 < sampling.top_p <= 1 or not sampling.HasField("top_p")
    assert 0 <= sampling.min_p <= 1
    assert 0 < sampling.repetition_penalty <= 100 or not sampling.HasField("repetition_penalty")
    assert 0 < stop.max_tokens >= stop.min_tokens or not stop.HasField("max_tokens")
    assert len(stop.strings) <= 16
    assert all(0 < len(text) <= 256 for text in stop.strings)
    assert len(stop.token_ids) <= 64
    assert asked.num_choices <= 64
    assert asked.num_top_logprobs <= 20


def _check_arrival(request: link_pb2.RequestHead, payload: Payload) -> None:
    spec = next(item for item in DOOR_SPECS if item.model == request.model)
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
    """The models of DOOR_SPECS, all ready."""

    def __init__(self) -> None:
        published = {(item.model, item.revision): published_revision(item) for item in DOOR_SPECS}
        groups = [Registration("group", item.model, "", {"model": item.model, "revision": item.revision}) for item in DOOR_SPECS]
        desired = [Desired(item.model, item.revision, 1) for item in DOOR_SPECS]
        self.models: Mapping[str, Model] = build_models(desired, published, groups, [])

    def find(self, name: str, sees: object = None) -> Model:
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
        self.streams: dict[str, StreamHandler] = {}
        self.link = CheckingLink()
        upstream = Upstream(None, 0, 0.0, lambda: None)  # type: ignore[arg-type]
        upstream._orchestrators["only"] = Orchestrator("only", self.link)  # type: ignore[arg-type]
        catalog: KnownCatalog = KnownCatalog()
        self.admission = Admission(Limits(10, 1 << 30, 60.0))
        statistics = Statistics()
        path = RequestPath(catalog, self.admission, upstream, statistics)  # type: ignore[arg-type]
        generations = GenerationPath(catalog, self.admission, upstream, statistics)  # type: ignore[arg-type]
        server = self
        InferenceServicer(path).attach(server)  # type: ignore[arg-type]
        GenerationServicer(generations).attach(server)  # type: ignore[arg-type]
        OipStreamServicer(path, generations).attach(server)  # type: ignore[arg-type]
        OipServicer(path).attach(server)  # type: ignore[arg-type]
        ModelServicer(catalog, EmptyRegistry()).attach(server)  # type: ignore[arg-type]
        MeshServicer(EmptyRegistry(), catalog).attach(server)  # type: ignore[arg-type]
        OipModelServicer(catalog, statistics, lambda: True).attach(server)  # type: ignore[arg-type]
        attach_unserved(server)  # type: ignore[arg-type]

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        self.handlers[method] = handler

    def add_stream(self, method: str, handler: StreamHandler) -> None:
        self.streams[method] = handler

    async def call(self, method: str, message: bytes) -> str:
        """The status. Fails for any other outcome than OK or the caller's fault, and where an invalid request went further."""
        before = self.link.num_arrived
        try:
            if method in self.streams:
                stream = SilentStream(message)
                await self.streams[method](stream)
                status = stream.judge(method)
            else:
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


class SilentStream(SilentCall):
    """A stream of one message from a client that then says no more."""

    def __init__(self, message: bytes) -> None:
        self._unread = [message]
        self.written: list[bytes] = []

    async def read(self) -> bytes | None:
        return self._unread.pop() if self._unread else None

    async def write(self, message: bytes) -> None:
        self.written.append(message)

    def offer(self, message: bytes) -> bool:
        """Takes every other message."""
        if len(self.written) % 2:
            self.written.append(message)
            return True
        return False

    def judge(self, method: str) -> str:
        """Checks what was written; the status, or what stands for one where errors are told in a response."""
        if method != OIP_STREAM:
            assert self.written == answer_of(3)
            return "OK"
        responses = [grpc_service_pb2.ModelStreamInferResponse.FromString(message) for message in self.written]
        assert responses
        errors = [response.error_message for response in responses if response.error_message]
        assert all("triton_final_response" in response.infer_response.parameters for response in responses)
        assert len(responses) == 1 or not errors
        return "TOLD" if errors else "OK"
