"""What `Client` and `AsyncClient` share: their settings, and messages to and from bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorway.arrays import to_tensor
from tensorway.client_attempts import Attempts
from tensorway.client_generate import GenerateOptions, Generation, Prompt
from tensorway.client_rota import endpoints_of
from tensorway.deadline import Deadline
from tensorway.errors import InvalidRequest
from tensorway.explaining import Explain
from tensorway.load_report import LoadReport, read_load
from tensorway.parameter_message import write_parameters
from tensorway.registry.port import Registration
from tensorway.results import InferResult, ModelDescription, read_model, read_result
from tensorway.tensor_message import tensor_field
from tensorway.tensors import Buffer
from tensorway.transport import UnaryReply
from tensorway.v1 import inference_pb2, mesh_pb2, model_pb2

Parameters = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, slots=True)
class Calls:
    """The settings of a client, and its messages to and from bytes. Endpoints are joined by commas; see `tensorway.client.Client`."""

    endpoint: str
    timeout_s: float
    retries: int
    as_torch: bool

    def begin(self, timeout_s: float | None) -> Attempts:
        """The attempts of one call, within its deadline."""
        deadline = Deadline.after(self.timeout_s if timeout_s is None else timeout_s)
        num_endpoints = len(endpoints_of(self.endpoint))
        return Attempts(deadline, self.retries * num_endpoints, num_spares=num_endpoints - 1)

    def generation(self, model: str, prompt: Prompt, options: GenerateOptions) -> Generation:
        """One call of Generate. Raises InvalidRequest for what cannot be sent."""
        return Generation(model, prompt, options, self.begin(options.get("timeout_s")))

    def infer_request(
        self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str] | None, revision: str, request_id: str,
        parameters: Parameters | None, priority: int, idempotency_key: str,
    ) -> bytes:
        """A serialised InferRequest. Raises InvalidRequest for what cannot be sent."""
        if isinstance(outputs, str):
            raise InvalidRequest(f"outputs: give a list of names, not the string {outputs!r}", field="outputs")
        try:
            request = inference_pb2.InferRequest(
                model=model, revision=revision, request_id=request_id, output_names=outputs or (), priority=priority,
                idempotency_key=idempotency_key,
            )
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"request: {error}", field="request") from error
        write_parameters(parameters or {}, request.parameters)
        return _with_inputs(request.SerializeToString(), inputs)

    def explain_request(self, model: str, inputs: Mapping[str, Any], wish: Explain, revision: str, request_id: str) -> bytes:
        """A serialised ExplainRequest. Raises InvalidRequest for what cannot be sent."""
        request = inference_pb2.ExplainRequest(model=model, revision=revision, request_id=request_id, options=wish.to_options())
        return _with_inputs(request.SerializeToString(), inputs)

    def infer_result(self, reply: UnaryReply) -> InferResult:
        return read_result(reply.response, reply.trailers, as_torch=self.as_torch)

    def models(self, reply: UnaryReply) -> tuple[ModelDescription, ...]:
        return tuple(map(read_model, model_pb2.ListModelsResponse.FromString(reply.response).models))

    def model(self, reply: UnaryReply) -> ModelDescription:
        return read_model(model_pb2.GetModelResponse.FromString(reply.response).model)

    def load_request(self, model: str) -> bytes:
        """A serialised GetLoadRequest; an empty name means all models."""
        return mesh_pb2.GetLoadRequest(model=model).SerializeToString()

    def loads(self, reply: UnaryReply) -> tuple[LoadReport, ...]:
        return tuple(map(read_load, mesh_pb2.GetLoadResponse.FromString(reply.response).loads))

    def scale_request(self, model: str, replicas: int) -> bytes:
        """A serialised ScaleModelRequest. Raises InvalidRequest for a number that is none of replicas."""
        try:
            return model_pb2.ScaleModelRequest(model=model, replicas=replicas).SerializeToString()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"replicas: {replicas!r} is no number of replicas; give 0 or more", field="replicas") from error

    def scaled(self, reply: UnaryReply) -> ModelDescription:
        return read_model(model_pb2.ScaleModelResponse.FromString(reply.response).model)

    def topology(self, reply: UnaryReply) -> tuple[Registration, ...]:
        members = mesh_pb2.GetTopologyResponse.FromString(reply.response).members
        return tuple(Registration(item.kind, item.id, item.endpoint, dict(item.metadata)) for item in members)


def _with_inputs(message: bytes, inputs: Mapping[str, Any]) -> bytes:
    """A serialised request with its tensors, whose bytes are copied once."""
    parts: list[Buffer] = [message]
    for name, value in inputs.items():
        tensor = to_tensor(name, value)
        parts += tensor_field(tensor.head, (tensor.data,))
    return b"".join(parts)
