"""Calls a mesh with the generated stubs and grpcio alone, as a client in any other language would.

Shows what `tensorway.Client` does for you: tensor bytes, the deadline, the trailers, and the google.rpc details of an error.

    python examples/python/stubs_client.py --values 1 2 3
"""

from __future__ import annotations

import argparse
import struct
from typing import Any

import grpc  # noqa: TID251 - this example is about grpcio itself
from google.rpc import error_details_pb2, status_pb2

from tensorway.v1 import inference_pb2, inference_pb2_grpc, tensor_pb2

DETAILS_TRAILER = "grpc-status-details-bin"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--endpoint", default="localhost:8001", help="the gateway, host:port")
    parser.add_argument("--model", default="identity", help="a model with one FP32 input [rows, any] called `input`")
    parser.add_argument("--values", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="one row of numbers")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="deadline of the request, seconds")
    return parser.parse_args()


def request_of(model: str, values: list[float]) -> inference_pb2.InferRequest:
    """One row: FP32, row-major, little-endian, no padding."""
    tensor = tensor_pb2.Tensor(
        name="input", dtype=tensor_pb2.DATA_TYPE_FP32, shape=[1, len(values)], data=struct.pack(f"<{len(values)}f", *values)
    )
    return inference_pb2.InferRequest(model=model, inputs=[tensor])


def show_error(error: grpc.RpcError) -> None:
    """Status and sentence, then the reason, the field at fault and when to come back, where the mesh says so."""
    print(f"{error.code().name}: {error.details()}")
    trailers: Any = error.trailing_metadata() or ()  # (name, value) pairs
    details = dict(trailers).get(DETAILS_TRAILER)
    if not isinstance(details, bytes):
        return  # whoever answered was no Tensorway service, or nobody answered
    for item in status_pb2.Status.FromString(details).details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if item.Is(kind.DESCRIPTOR):
                message = kind()
                item.Unpack(message)
                print(f"{kind.DESCRIPTOR.name}: {str(message).strip()}")


def main() -> int:
    """One request; returns the exit status."""
    arguments = parse_arguments()
    with grpc.insecure_channel(arguments.endpoint) as channel:
        infer = inference_pb2_grpc.InferenceServiceStub(channel).Infer  # type: ignore[no-untyped-call]
        try:
            response, call = infer.with_call(request_of(arguments.model, arguments.values), timeout=arguments.timeout_s)
        except grpc.RpcError as error:
            show_error(error)
            return 1
    for tensor in response.outputs:
        numbers = struct.unpack(f"<{len(tensor.data) // 4}f", tensor.data)
        print(f"{tensor.name} {list(tensor.shape)}: {' '.join(f'{number:g}' for number in numbers)}")
    for name, value in call.trailing_metadata():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
