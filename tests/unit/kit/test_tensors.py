"""Tensor bytes: lengths, shapes, BYTES elements, and errors and deadlines as the wire sees them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.deadline import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, Deadline
from tensorway.errors import ERROR_OF_REASON, STATUS_OF, InternalError, InvalidRequest, Status, TensorwayError, Unavailable, error_from
from tensorway.tensors import DataType, check_bytes_elements, check_num_bytes, decode_bytes, encode_bytes, num_elements
from tensorway.v1 import tensor_pb2


@given(st.lists(st.binary(max_size=50), max_size=30))
def test_bytes_elements_survive_the_wire(elements: list[bytes]) -> None:
    content = encode_bytes(elements)
    check_bytes_elements(content, len(elements), "x")
    assert decode_bytes(content) == elements
    assert decode_bytes(memoryview(content)) == elements


@given(st.binary(max_size=200), st.integers(0, 20))
def test_no_bytes_can_hurt_the_check(content: bytes, count: int) -> None:
    try:
        check_bytes_elements(content, count, "x")
    except InvalidRequest as error:
        assert error.field == "x"
    else:
        assert encode_bytes(decode_bytes(content)) == content
        assert len(decode_bytes(content)) == count


@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes", "fits"),
    [
        (DataType.FP32, (), 4, True), (DataType.FP32, (0, 5), 0, True), (DataType.BF16, (3,), 6, True), (DataType.BOOL, (2, 2), 4, True),
        (DataType.INT64, (2,), 15, False), (DataType.FP32, (-1,), 4, False), (DataType.FP32, (2**40, 2**40), 4, False),
        (DataType.UINT8, (1,), 0, False),
    ],
)
def test_length_must_be_shape_times_item_size(dtype: DataType, shape: tuple[int, ...], num_bytes: int, fits: bool) -> None:
    if fits:
        check_num_bytes(dtype, shape, bytes(num_bytes), "inputs[0]")
    else:
        with pytest.raises(InvalidRequest, match=r"inputs\[0\]"):
            check_num_bytes(dtype, shape, bytes(num_bytes), "inputs[0]")


def test_a_scalar_has_one_element() -> None:
    assert num_elements((), "x") == 1


def test_data_types_are_those_of_the_contract() -> None:
    assert {f"DATA_TYPE_{dtype.name}": int(dtype) for dtype in DataType} | {"DATA_TYPE_UNSPECIFIED": 0} == dict(tensor_pb2.DataType.items())


def test_every_error_has_a_row_in_the_table_and_comes_back_as_itself() -> None:
    def below(kind: type[TensorwayError]) -> set[type[TensorwayError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert {kind for kind in below(TensorwayError) if kind.__module__ == "tensorway.errors"} == set(STATUS_OF)
    for reason, kind in ERROR_OF_REASON.items():
        error = error_from(reason, 0, "m", field="f", hop="h", retry_after_s=1.5)
        assert type(error) is kind
        assert (error.message, error.field, error.hop, error.retry_after_s) == ("m", "f", "h", 1.5)
    assert type(error_from("", Status.DATA_LOSS, "m")) is InternalError
    assert type(error_from("", 99, "m")) is InternalError


def test_a_refinement_of_an_error_has_its_parents_row() -> None:
    class Refined(Unavailable):
        pass

    assert (Refined("m").status, Refined("m").is_retryable, Refined("m").reason) == (Status.UNAVAILABLE, True, "UNAVAILABLE")


def test_deadlines_travel_as_what_remains() -> None:
    deadline = Deadline.after(2.0, now_s=100.0)
    assert deadline.remaining_s(101.5) == 0.5
    assert not deadline.has_expired(101.9)
    assert deadline.has_expired(102.0)
    assert Deadline(0.0).remaining_us() == 1  # 0 would mean "none set"
    assert Deadline.after(10 * MAX_TIMEOUT_S, now_s=0.0).at_s == MAX_TIMEOUT_S
    assert Deadline.from_remaining_us(0).remaining_s() == pytest.approx(DEFAULT_TIMEOUT_S, abs=1.0)
