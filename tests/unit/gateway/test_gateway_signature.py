"""SignatureCheck: every request drawn from a signature passes, and every way of breaking one is refused with its field named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import InvalidRequest
from tensorway.signature import ROWS, Batching, RevisionSpec, Signature, TensorSpec
from tensorway.tensors import ITEM_SIZE, DataType, Tensor, encode_bytes
from tensorway_gateway.servicers.oip_tensors import oip_field
from tensorway_gateway.signature import MAX_BYTES_ELEMENTS, SignatureCheck

_NAMES = ("alpha", "beta", "gamma", "delta")


def revision(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...] = (), **batching: object) -> RevisionSpec:
    outputs = outputs or (TensorSpec("out", DataType.FP32, (ROWS,) if all(item.has_rows for item in inputs) else ()),)
    return RevisionSpec("m", "0" * 64, "1", "", "python", Signature(inputs, outputs), Batching(**batching), 1, 60.0)  # type: ignore[arg-type]


def content(dtype: DataType, shape: tuple[int, ...]) -> bytes:
    count = 1
    for extent in shape:
        count *= extent
    return encode_bytes([b"ab"] * count) if dtype is DataType.BYTES else bytes(count * ITEM_SIZE[dtype])


def tensor(name: str, dtype: DataType, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, dtype, shape, content(dtype, shape))


@st.composite
def requests(draw: st.DrawFn) -> tuple[RevisionSpec, list[Tensor], int]:
    """A signature, a request that fits it, and its rows."""
    extents = {ROWS: draw(st.integers(1, 8)), "n": draw(st.integers(0, 4)), "length": draw(st.integers(0, 5))}
    is_batchable = draw(st.booleans())
    specs = []
    for name in _NAMES[: draw(st.integers(1, 4))]:
        tail = tuple(draw(st.lists(st.one_of(st.integers(0, 3), st.sampled_from(("n", "length"))), max_size=3)))
        specs.append(TensorSpec(name, draw(st.sampled_from(DataType)), ((ROWS, *tail) if is_batchable else tail)))
    shapes = [tuple(extents[extent] if isinstance(extent, str) else extent for extent in item.shape) for item in specs]
    inputs = [tensor(item.name, item.dtype, shape) for item, shape in zip(specs, shapes, strict=True)]
    outputs = (TensorSpec("out", DataType.FP32, (ROWS, 3) if is_batchable else (3,)),)
    return revision(tuple(specs), outputs, max_rows=8), draw(st.permutations(inputs)), extents[ROWS] if is_batchable else 1


@given(requests())
def test_a_request_that_fits_passes_and_tells_its_rows(drawn: tuple[RevisionSpec, list[Tensor], int]) -> None:
    spec, inputs, rows = drawn
    assert SignatureCheck(spec).rows(inputs, ()) == rows
    assert SignatureCheck(spec).rows(inputs, ("out",), oip_field) == rows


@given(requests(), st.data())
def test_any_broken_part_is_refused_and_named(drawn: tuple[RevisionSpec, list[Tensor], int], data: st.DataObject) -> None:
    spec, inputs, _ = drawn
    index = data.draw(st.integers(0, len(inputs) - 1))
    good = inputs[index]
    kind = data.draw(st.sampled_from(("name", "twice", "missing", "dtype", "rank", "negative", "longer", "shorter", "output")))
    names: tuple[str, ...] = ()
    if kind == "name":
        inputs[index] = replace(good, name="omega")
        field = f"inputs[{index}].name"
    elif kind == "twice":
        inputs.append(good)
        field = f"inputs[{len(inputs) - 1}].name"
    elif kind == "missing":
        del inputs[index]
        field = "inputs"
    elif kind == "dtype":
        other = data.draw(st.sampled_from([item for item in DataType if item is not good.dtype]))
        inputs[index] = replace(good, dtype=other)
        field = f"inputs[{index}].dtype"
    elif kind == "rank":
        inputs[index] = replace(good, shape=(*good.shape, 1))
        field = f"inputs[{index}].shape"
    elif kind == "negative":
        if not good.shape:
            return
        inputs[index] = replace(good, shape=(*good.shape[:-1], -1))
        field = f"inputs[{index}].shape"
    elif kind == "output":
        names, field = ("nothing",), "output_names[0]"
    else:
        spare = content(good.dtype, (1,))
        if kind == "shorter" and not good.data:
            return
        inputs[index] = replace(good, data=bytes(good.data) + spare if kind == "longer" else bytes(good.data)[:-1])
        field = f"inputs[{index}].data"
    with pytest.raises(InvalidRequest) as caught:
        SignatureCheck(spec).rows(inputs, names)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "field"),
    [(((2, 3), (2, 4)), "inputs[1].shape"), (((2, 3), (1, 3)), "inputs[1].shape"), (((2, 2**50), (2, 3)), "inputs[0].shape")],
)
def test_equal_names_mean_equal_extents(shapes: tuple[tuple[int, ...], tuple[int, ...]], field: str) -> None:
    check = SignatureCheck(revision(tuple(TensorSpec(name, DataType.INT8, (ROWS, "n")) for name in ("a", "b"))))
    inputs = [Tensor(name, DataType.INT8, shape, bytes(min(8, shape[0] * shape[1]))) for name, shape in zip("ab", shapes, strict=True)]
    with pytest.raises(InvalidRequest) as caught:
        check.rows(inputs, ())
    assert caught.value.field == field


def test_rows_are_bounded_by_the_batch_unless_it_may_run_alone() -> None:
    inputs = (TensorSpec("x", DataType.UINT8, (ROWS,)),)
    nine = [tensor("x", DataType.UINT8, (9,))]
    with pytest.raises(InvalidRequest, match="9 rows are more than the 8"):
        SignatureCheck(revision(inputs, max_rows=8)).rows(nine, ())
    assert SignatureCheck(revision(inputs, max_rows=8, oversize="alone")).rows(nine, ()) == 9
    with pytest.raises(InvalidRequest, match="at least one row"):
        SignatureCheck(revision(inputs)).rows([tensor("x", DataType.UINT8, (0,))], ())


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00a", b"\x00\x00\x00", b"\x01\x00\x00\x00ab", b""])
def test_hostile_prefixes_of_bytes_are_refused(data: bytes) -> None:
    check = SignatureCheck(revision((TensorSpec("x", DataType.BYTES, ("n",)),), (TensorSpec("y", DataType.BYTES, ("n",)),)))
    with pytest.raises(InvalidRequest) as caught:
        check.rows([Tensor("x", DataType.BYTES, (1,), data)], ())
    assert caught.value.field == "inputs[0].data"


def test_more_strings_than_may_be_walked_are_refused() -> None:
    check = SignatureCheck(revision((TensorSpec("x", DataType.BYTES, ("n",)),), (TensorSpec("y", DataType.BYTES, ("n",)),)))
    count = MAX_BYTES_ELEMENTS + 1
    with pytest.raises(InvalidRequest, match="split the request"):
        check.rows([Tensor("x", DataType.BYTES, (count,), bytes(4 * count))], ())


def test_a_bool_is_zero_or_one() -> None:
    check = SignatureCheck(revision((TensorSpec("x", DataType.BOOL, ("n",)),), (TensorSpec("y", DataType.BYTES, ("n",)),)))
    assert check.rows([Tensor("x", DataType.BOOL, (2,), b"\x00\x01")], ()) == 1
    with pytest.raises(InvalidRequest, match="0x00 or 0x01"):
        check.rows([Tensor("x", DataType.BOOL, (2,), b"\x00\x02")], ())


def test_an_output_may_not_be_asked_for_twice() -> None:
    check = SignatureCheck(revision((TensorSpec("x", DataType.UINT8, (ROWS,)),)))
    with pytest.raises(InvalidRequest, match="asked for twice"):
        check.rows([tensor("x", DataType.UINT8, (1,))], ("out", "out"))


def test_oip_names_inputs_by_name() -> None:
    check = SignatureCheck(revision((TensorSpec("x", DataType.UINT8, (ROWS,)),)))
    with pytest.raises(InvalidRequest, match="input 'x' dtype"):
        check.rows([tensor("x", DataType.INT8, (1,))], (), oip_field)
