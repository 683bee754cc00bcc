"""Lifting changes nothing but who holds the bytes, and leaves every judgement to protobuf."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.compat.grpc_service_pb2 import ModelInferRequest
from tensorway.v1.inference_pb2 import InferRequest
from tensorway.v1.tensor_pb2 import Tensor
from tensorway_gateway.lifting import lift_raw_contents, lift_tensors

_CONTENTS = st.lists(st.binary(max_size=40), max_size=5)


def native(contents: list[bytes]) -> InferRequest:
    inputs = [Tensor(name=f"n{index}", dtype=3, shape=[len(data), 2], data=data) for index, data in enumerate(contents)]
    return InferRequest(model="m", inputs=inputs, output_names=["y"], priority=-1)


def oip(contents: list[bytes]) -> ModelInferRequest:
    request = ModelInferRequest(model_name="m", raw_input_contents=contents)
    request.parameters["p"].double_param = 0.5
    for _ in contents:
        request.inputs.add(name="x", datatype="UINT8", shape=[1])
    return request


def put_back_native(message: bytes, threshold: int) -> InferRequest:
    rest, lifted = lift_tensors(message, threshold)
    request = InferRequest.FromString(rest)
    for index, data in lifted.items():
        assert request.inputs[index].data == b""
        request.inputs[index].data = bytes(data)
    return request


def put_back_oip(message: bytes, threshold: int) -> ModelInferRequest:
    rest, lifted = lift_raw_contents(message, threshold)
    request = ModelInferRequest.FromString(rest)
    for index, data in lifted.items():
        request.raw_input_contents[index] = bytes(data)
    return request


@given(_CONTENTS, st.integers(1, 30))
def test_what_is_lifted_and_what_is_left_are_the_message(contents: list[bytes], threshold: int) -> None:
    assert put_back_native(native(contents).SerializeToString(), threshold) == native(contents)
    assert put_back_oip(oip(contents).SerializeToString(), threshold) == oip(contents)


def test_large_bytes_are_lifted_and_small_ones_are_not() -> None:
    _, lifted = lift_tensors(native([b"a" * 30, b"b" * 5, b"c" * 20]).SerializeToString(), 20)
    assert {index: bytes(view) for index, view in lifted.items()} == {0: b"a" * 30, 2: b"c" * 20}
    _, lifted = lift_raw_contents(oip([b"a" * 30, b"", b"c" * 20]).SerializeToString(), 20)
    assert {index: bytes(view) for index, view in lifted.items()} == {0: b"a" * 30, 2: b"c" * 20}


def test_of_data_given_twice_the_last_counts() -> None:
    tensor = Tensor(data=b"first" * 9).SerializeToString() + Tensor(data=b"last").SerializeToString()
    message = b"\x22" + bytes([len(tensor)]) + tensor
    assert put_back_native(message, 8) == InferRequest.FromString(message)
    tensor = Tensor(data=b"first").SerializeToString() + Tensor(data=b"last" * 9).SerializeToString()
    message = b"\x22" + bytes([len(tensor)]) + tensor
    assert put_back_native(message, 8) == InferRequest.FromString(message)


@pytest.mark.parametrize("dialect", ["native", "oip"])
@given(seed=st.integers(0, 2**63 - 1))
@settings(max_examples=100, deadline=None)
def test_wounded_messages_are_read_as_protobuf_reads_them(dialect: str, seed: int) -> None:
    rng = random.Random(seed)
    contents = [rng.randbytes(rng.randint(0, 40)) for _ in range(rng.randint(1, 4))]
    whole = native(contents).SerializeToString() if dialect == "native" else oip(contents).SerializeToString()
    read, put_back = (InferRequest.FromString, put_back_native) if dialect == "native" else (ModelInferRequest.FromString, put_back_oip)
    for _ in range(100):
        wounded = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2))):
            wounded[rng.randrange(len(wounded))] = rng.choice((0, 0x22, 0x3A, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        message = bytes(wounded)
        try:
            expected = read(message)
        except DecodeError:
            with pytest.raises(DecodeError):
                put_back(message, 4)
        else:
            # By their bytes: a NaN does not equal itself.
            found = put_back(message, 4).SerializeToString(deterministic=True)
            assert found == expected.SerializeToString(deterministic=True), message.hex()
