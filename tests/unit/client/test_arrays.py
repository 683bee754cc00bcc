"""Arrays to the wire and back, for every data type, with numpy and with torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from tensorway.arrays import bfloat16, from_nested, load_npy, preview, to_nested, to_numpy, to_tensor, to_torch
from tensorway.errors import InvalidRequest
from tensorway.signature import TensorSpec
from tensorway.tensors import DataType, Tensor, check_num_bytes

_CODES = ("?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
_SHAPES = st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
_ARRAYS = st.sampled_from(_CODES).flatmap(
    lambda code: st_numpy.arrays(st.sampled_from(("<", ">")).map(lambda order: np.dtype(order + code)), _SHAPES)
)


def _same(a: np.ndarray, b: np.ndarray) -> bool:  # type: ignore[type-arg]
    return a.shape == b.shape and a.astype(a.dtype.newbyteorder("<")).tobytes() == np.ascontiguousarray(b).tobytes()


@given(_ARRAYS, st.booleans())
def test_every_array_comes_back_as_it_went(array: np.ndarray, is_transposed: bool) -> None:  # type: ignore[type-arg]
    array = array.T if is_transposed else array
    tensor = to_tensor("x", array)
    check_num_bytes(tensor.dtype, tensor.shape, tensor.data, "x")
    back = to_numpy(Tensor("x", tensor.dtype, tensor.shape, bytes(tensor.data)))
    assert back.dtype == array.dtype.newbyteorder("<")
    assert _same(array, back)


@given(st_numpy.arrays(object, _SHAPES, elements=st.one_of(st.binary(max_size=9), st.text(max_size=5))))
def test_strings_come_back_as_bytes(array: np.ndarray) -> None:  # type: ignore[type-arg]
    tensor = to_tensor("x", array)
    assert tensor.dtype is DataType.BYTES
    check_num_bytes(tensor.dtype, tensor.shape, tensor.data, "x")
    expected = [item.encode() if isinstance(item, str) else item for item in array.reshape(-1).tolist()]
    back = to_numpy(tensor)
    assert back.shape == array.shape
    assert back.reshape(-1).tolist() == expected


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32,
              torch.float64, torch.bfloat16],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_every_torch_tensor_comes_back_as_it_went(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given_ = torch.ones(shape, dtype=dtype)
    tensor = to_tensor("x", given_)
    back = to_torch(Tensor("x", tensor.dtype, tensor.shape, bytes(tensor.data)))
    assert back.dtype is dtype
    assert torch.equal(back, given_)
    back.fill_(0)  # its own, writable memory


def test_a_transposed_torch_tensor_that_needs_its_gradient_is_sent_row_major() -> None:
    given_ = torch.arange(6.0).reshape(2, 3).requires_grad_().T
    assert np.array_equal(to_numpy(to_tensor("x", given_)), given_.detach().numpy())


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    expected = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    tensor = to_tensor("x", bfloat16(values))
    assert tensor.dtype is DataType.BF16
    found = to_torch(tensor)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])
    assert np.array_equal(to_numpy(tensor), expected.float().numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [
        ([1.5, 2], DataType.FP32, (2,)), (1.5, DataType.FP32, ()), ([[1], [2]], DataType.INT64, (2, 1)), (True, DataType.BOOL, ()),
        ("text", DataType.BYTES, (1,)), (b"\x00", DataType.BYTES, (1,)), (["a", "b"], DataType.BYTES, (2,)),
        ([b"a\x00"], DataType.BYTES, (1,)),
        (np.float64(1), DataType.FP64, ()), (range(3), DataType.INT64, (3,)),
    ],
)
def test_plain_python_values(value: object, dtype: DataType, shape: tuple[int, ...]) -> None:
    tensor = to_tensor("x", value)
    assert (tensor.dtype, tensor.shape) == (dtype, shape)


def test_bytes_with_trailing_zeros_are_not_cut() -> None:
    assert to_numpy(to_tensor("x", [b"a\x00", b"bcd"])).tolist() == [b"a\x00", b"bcd"]


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.arange(4, dtype=np.float32)
    tensor = to_tensor("x", array)
    array[0] = 9
    assert np.frombuffer(tensor.data, "<f4")[0] == 9


@pytest.mark.parametrize(
    "value",
    [1j, np.array(["2020"], "M8[Y]"), [[1], [1, 2]], object(), [None], np.longdouble(1), torch.zeros(2, dtype=torch.complex64),
     torch.zeros(2).to_sparse()],
)
def test_what_the_wire_cannot_carry_is_named(value: object) -> None:
    with pytest.raises(InvalidRequest, match="input 'pixels'"):
        to_tensor("pixels", value)


def test_torch_cannot_hold_strings() -> None:
    with pytest.raises(InvalidRequest, match="BYTES"):
        to_torch(to_tensor("x", ["a"]))


def test_nested_lists_take_the_signatures_type_and_gain_a_row() -> None:
    spec = TensorSpec("x", DataType.INT16, ("rows", 2))
    assert to_numpy(from_nested(spec, [1, 2])).tolist() == [[1, 2]]
    assert to_nested(from_nested(TensorSpec("t", DataType.BYTES, ("rows",)), ["a", "ü"])) == ["a", "ü"]
    assert to_nested(from_nested(TensorSpec("h", DataType.BF16, ("rows",)), [1.5])) == [1.5]
    with pytest.raises(InvalidRequest, match="no array of INT16"):
        from_nested(spec, ["a", 2])


def test_npy_files_are_read_without_unpickling(tmp_path) -> None:  # type: ignore[no-untyped-def]
    np.save(tmp_path / "good.npy", np.arange(3))
    np.save(tmp_path / "bad.npy", np.array([object()]), allow_pickle=True)
    assert to_numpy(load_npy("x", tmp_path / "good.npy")).tolist() == [0, 1, 2]
    for name in ("bad.npy", "absent.npy"):
        with pytest.raises(InvalidRequest, match=name):
            load_npy("x", tmp_path / name)


def test_previews_are_short() -> None:
    assert len(preview(to_tensor("x", np.zeros((100, 100), np.float32)))) < 400
    assert preview(to_tensor("x", ["a" * 500] * 50)).endswith("…")


@pytest.mark.parametrize("module", ["tensorway.client", "tensorway.cli.infer", "tensorway.cli.models", "tensorway.cli.doctor"])
def test_importing_pulls_in_no_array_library_and_no_foreign_protocol(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'numpy', 'torch', 'grpc', 'tensorway.compat'}} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    # The client needs a transport, and nothing else of these.
    assert found.stdout.strip() in ("[]", "['grpc']" if module == "tensorway.client" else "[]")
