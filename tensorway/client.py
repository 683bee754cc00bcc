"""The Python client: `Client` for ordinary code, `AsyncClient` for asyncio.

    with Client("localhost:8001") as client:
        result = client.infer("minilm", {"text": ["a sentence", "another"]})
        result["embedding"]          # numpy, [2, 384]
        for piece in client.generate_text("smollm2-chat", [{"role": "user", "content": "Why is the sky blue?"}], max_tokens=100):
            print(piece, end="", flush=True)

Both retry what another attempt may cure (a lost or overloaded service), within the deadline, and raise `TensorwayError`s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import Any, Final, Self, Unpack

from tensorway.client_calls import Calls, Parameters
from tensorway.client_credentials import credentials_of
from tensorway.client_generate import GenerateOptions, Prompt, generate, generate_async, text_of, text_of_async
from tensorway.client_operations import (
    SET_LEVEL,
    LevelChange,
    ProfileProgress,
    ProfileWish,
    level_request,
    profile,
    profile_async,
    read_levels,
)
from tensorway.client_rota import AsyncChannels, BlockingChannels, endpoints_of
from tensorway.deadline import DEFAULT_TIMEOUT_S
from tensorway.errors import DeadlineExceeded, TensorwayError, Unavailable
from tensorway.explaining import Explain
from tensorway.load_report import LoadReport
from tensorway.registry.port import Registration
from tensorway.results import (
    ChatMessage,
    Delta,
    Finished,
    GenerationEvent,
    InferResult,
    ModelDescription,
    Started,
)
from tensorway.tls import Tls, channel_tls
from tensorway.transport import UnaryReply
from tensorway.transport.port import DEFAULT_MAX_MESSAGE_BYTES
from tensorway.v1 import model_pb2

__all__ = ["AsyncClient", "ChatMessage", "Client", "Delta", "Explain", "Finished", "Started", "Tls"]

Metadata = Mapping[str, str] | Sequence[tuple[str, str]]

DEFAULT_ENDPOINT: Final = "localhost:8001"
_INFER: Final = "/tensorway.v1.InferenceService/Infer"
_EXPLAIN: Final = "/tensorway.v1.InferenceService/Explain"
_LIST_MODELS: Final = "/tensorway.v1.ModelService/ListModels"
_GET_MODEL: Final = "/tensorway.v1.ModelService/GetModel"
_GET_TOPOLOGY: Final = "/tensorway.v1.MeshService/GetTopology"
_GET_LOAD: Final = "/tensorway.v1.MeshService/GetLoad"
_SCALE_MODEL: Final = "/tensorway.v1.ModelService/ScaleModel"
_CHECK: Final = "/grpc.health.v1.Health/Check"
#: Integrated gradients of what the model itself finds largest.
_EXPLAIN_ALL: Final = Explain()
#: A grpc.health.v1 request for the whole server, and the response that says SERVING (field 1 = 1).
_CHECK_ALL: Final = b""
_SERVING: Final = b"\x08\x01"


class Client:
    """A client of a mesh; may be shared between threads. Close it, or use it as a context manager.

    `endpoint` is a gateway's, or those of several joined by commas: calls go round them, and past one that does not answer. `timeout_s` is
    the deadline of a call that sets none; `retries` the attempts after the first, for each endpoint; `metadata` goes with every call; with
    `as_torch`, results hold torch tensors. `tls`: True for TLS with the system's authorities, or a `Tls` that says whom to trust.
    `api_key` or `token` says who calls; a function for `token` is called for each attempt and returns the token that is good then.
    """

    def __init__(
        self, endpoint: str = DEFAULT_ENDPOINT, *, timeout_s: float = DEFAULT_TIMEOUT_S, metadata: Metadata = (), retries: int = 3,
        as_torch: bool = False, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, tls: Tls | bool = False,
        api_key: str = "", token: str | Callable[[], str] = "",
    ) -> None:
        self._calls = Calls(endpoint, timeout_s, retries, as_torch)
        self._channel = BlockingChannels(
            endpoints_of(endpoint), credentials_of(api_key, token), max_message_bytes=max_message_bytes, metadata=_pairs(metadata),
            tls=channel_tls(tls),
        )

    def infer(
        self, model: str, inputs: Mapping[str, Any], *, outputs: Sequence[str] | None = None, revision: str = "", request_id: str = "",
        parameters: Parameters | None = None, priority: int = 0, idempotency_key: str = "", timeout_s: float | None = None,
    ) -> InferResult:
        """Runs one request. See `tensorway.arrays.to_tensor` for what an input may be. `outputs` None returns all; higher `priority`
        (-100 to 100) goes first; `revision` is a content hash or a prefix of 8 or more digits; with an
        `idempotency_key`, asking again gets the answer of the first run."""
        message = self._calls.infer_request(model, inputs, outputs, revision, request_id, parameters, priority, idempotency_key)
        return self._calls.infer_result(self._unary(_INFER, message, timeout_s))

    def explain(
        self, model: str, inputs: Mapping[str, Any], wish: Explain = _EXPLAIN_ALL, *, revision: str = "", request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """How much each element of an input contributed: `attribution`, `score`, `chosen`, and more by method; see `tensorway.Explain`."""
        message = self._calls.explain_request(model, inputs, wish, revision, request_id)
        return self._calls.infer_result(self._unary(_EXPLAIN, message, timeout_s))

    def generate(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generator[GenerationEvent]:
        """Has a model continue a prompt: text, token ids, or chat messages. Yields `Started`, `Delta`s, and a `Finished` for each choice,
        as they are made. A connection that breaks is taken up again where it broke. Closing the generator ends the answer."""
        return generate(self._channel, self._calls.generation(model, prompt, options), time.sleep)

    def generate_text(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generator[str]:
        """`generate`, but only the pieces of the text of its one answer."""
        return text_of(self.generate(model, prompt, **options), options)

    def models(self, *, timeout_s: float | None = None) -> tuple[ModelDescription, ...]:
        """All models of the mesh, by name."""
        return self._calls.models(self._unary(_LIST_MODELS, b"", timeout_s))

    def model(self, name: str, *, timeout_s: float | None = None) -> ModelDescription:
        """One model. Raises NotFound, with the names that exist."""
        return self._calls.model(self._unary(_GET_MODEL, model_pb2.GetModelRequest(name=name).SerializeToString(), timeout_s))

    def load(self, model: str = "", *, timeout_s: float | None = None) -> tuple[LoadReport, ...]:
        """How much each model has to do, and how many replicas that needs; of all models by name, or of one."""
        return self._calls.loads(self._unary(_GET_LOAD, self._calls.load_request(model), timeout_s))

    def scale(self, model: str, replicas: int, *, timeout_s: float | None = None) -> ModelDescription:
        """Sets how many replicas of a model are wanted, and returns before they are there. Raises FailedPrecondition outside the bounds of
        a model that scales by itself; within them, the mesh may change the number again."""
        return self._calls.scaled(self._unary(_SCALE_MODEL, self._calls.scale_request(model, replicas), timeout_s))

    def topology(self, *, timeout_s: float | None = None) -> tuple[Registration, ...]:
        """Every live service and group."""
        return self._calls.topology(self._unary(_GET_TOPOLOGY, b"", timeout_s))

    def profile(self, wish: ProfileWish) -> Generator[ProfileProgress | bytes]:
        """Records the next steps of a live group on all its ranks while it serves: progress, and then the pieces of a gzipped Chrome trace.
        Send requests meanwhile. Closing the generator ends it."""
        return profile(self._channel, wish)

    def set_log_level(
        self, level: str, members: Sequence[str] = (), *, seconds: float = 0.0, timeout_s: float | None = None
    ) -> tuple[LevelChange, ...]:
        """Sets the log level of members, by id, or of all, for so many seconds, or until they start again; says what became of each."""
        return read_levels(self._unary(SET_LEVEL, level_request(level, members, seconds), timeout_s).response)

    def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether the gateway answers and can serve requests now."""
        try:
            return self._channel.unary(_CHECK, _CHECK_ALL, timeout_s).response == _SERVING
        except (Unavailable, DeadlineExceeded):
            return False

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, method: str, message: bytes, timeout_s: float | None) -> UnaryReply:
        attempts = self._calls.begin(timeout_s)
        while True:
            try:
                return self._channel.unary(method, message, attempts.deadline.remaining_s())
            except TensorwayError as error:
                pause_s = attempts.pause_s(error)
            time.sleep(pause_s)


class AsyncClient:
    """`Client` for asyncio: the same arguments and methods, to be awaited. Use it within one loop."""

    def __init__(
        self, endpoint: str = DEFAULT_ENDPOINT, *, timeout_s: float = DEFAULT_TIMEOUT_S, metadata: Metadata = (), retries: int = 3,
        as_torch: bool = False, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, tls: Tls | bool = False,
        api_key: str = "", token: str | Callable[[], str] = "",
    ) -> None:
        self._calls = Calls(endpoint, timeout_s, retries, as_torch)
        self._endpoints = endpoints_of(endpoint)
        self._credentials = credentials_of(api_key, token)
        self._max_message_bytes = max_message_bytes
        self._metadata = _pairs(metadata)
        self._tls = channel_tls(tls)
        #: Made on first use: it belongs to the loop that runs then.
        self._channel: AsyncChannels | None = None

    async def infer(
        self, model: str, inputs: Mapping[str, Any], *, outputs: Sequence[str] | None = None, revision: str = "", request_id: str = "",
        parameters: Parameters | None = None, priority: int = 0, idempotency_key: str = "", timeout_s: float | None = None,
    ) -> InferResult:
        """See `Client.infer`."""
        message = self._calls.infer_request(model, inputs, outputs, revision, request_id, parameters, priority, idempotency_key)
        return self._calls.infer_result(await self._unary(_INFER, message, timeout_s))

    async def explain(
        self, model: str, inputs: Mapping[str, Any], wish: Explain = _EXPLAIN_ALL, *, revision: str = "", request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """See `Client.explain`."""
        message = self._calls.explain_request(model, inputs, wish, revision, request_id)
        return self._calls.infer_result(await self._unary(_EXPLAIN, message, timeout_s))

    def generate(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerator[GenerationEvent]:
        """See `Client.generate`. Close it (`contextlib.aclosing`) where you leave it early."""
        return generate_async(self._open(), self._calls.generation(model, prompt, options))

    def generate_text(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerator[str]:
        """See `Client.generate_text`."""
        return text_of_async(self.generate(model, prompt, **options), options)

    async def models(self, *, timeout_s: float | None = None) -> tuple[ModelDescription, ...]:
        """See `Client.models`."""
        return self._calls.models(await self._unary(_LIST_MODELS, b"", timeout_s))

    async def model(self, name: str, *, timeout_s: float | None = None) -> ModelDescription:
        """See `Client.model`."""
        return self._calls.model(await self._unary(_GET_MODEL, model_pb2.GetModelRequest(name=name).SerializeToString(), timeout_s))

    async def load(self, model: str = "", *, timeout_s: float | None = None) -> tuple[LoadReport, ...]:
        """See `Client.load`."""
        return self._calls.loads(await self._unary(_GET_LOAD, self._calls.load_request(model), timeout_s))

    async def scale(self, model: str, replicas: int, *, timeout_s: float | None = None) -> ModelDescription:
        """See `Client.scale`."""
        return self._calls.scaled(await self._unary(_SCALE_MODEL, self._calls.scale_request(model, replicas), timeout_s))

    async def topology(self, *, timeout_s: float | None = None) -> tuple[Registration, ...]:
        """See `Client.topology`."""
        return self._calls.topology(await self._unary(_GET_TOPOLOGY, b"", timeout_s))

    def profile(self, wish: ProfileWish) -> AsyncGenerator[ProfileProgress | bytes]:
        """See `Client.profile`. Close it (`contextlib.aclosing`) where you leave it early."""
        return profile_async(self._open(), wish)

    async def set_log_level(
        self, level: str, members: Sequence[str] = (), *, seconds: float = 0.0, timeout_s: float | None = None
    ) -> tuple[LevelChange, ...]:
        """See `Client.set_log_level`."""
        return read_levels((await self._unary(SET_LEVEL, level_request(level, members, seconds), timeout_s)).response)

    async def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """See `Client.is_ready`."""
        try:
            return (await self._open().unary(_CHECK, _CHECK_ALL, timeout_s)).response == _SERVING
        except (Unavailable, DeadlineExceeded):
            return False

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _open(self) -> AsyncChannels:
        if self._channel is None:
            self._channel = AsyncChannels(
                self._endpoints, self._credentials, max_message_bytes=self._max_message_bytes, metadata=self._metadata, tls=self._tls
            )
        return self._channel

    async def _unary(self, method: str, message: bytes, timeout_s: float | None) -> UnaryReply:
        attempts = self._calls.begin(timeout_s)
        while True:
            try:
                return await self._open().unary(method, message, attempts.deadline.remaining_s())
            except TensorwayError as error:
                pause_s = attempts.pause_s(error)
            await asyncio.sleep(pause_s)


def _pairs(metadata: Metadata) -> tuple[tuple[str, str], ...]:
    return tuple(metadata.items() if isinstance(metadata, Mapping) else metadata)
