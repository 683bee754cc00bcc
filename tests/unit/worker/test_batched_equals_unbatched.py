"""Whatever requests are joined, each gets exactly what it would have got alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worker_wire import InProcess, Sent, answered

from tensorway.tensors import ITEM_SIZE, DataType, Tensor, encode_bytes

_MODEL = '''
import numpy
import torch
from tensorway.model import Model

class Echo(Model):
    """`output` is `input`; `count` the number of bytes that are not zero in each row."""

    def forward(self, inputs):
        value = inputs["input"]
        if isinstance(value, torch.Tensor):
            raw = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
            rows = value.shape[0] if value.ndim else 1
            width = raw.numel() // rows if rows else 0
            counts = raw.reshape(rows, width).ne(0).sum(dim=1)
        else:
            rows = value if value.ndim else value.reshape(1)
            counts = torch.tensor([sum(len(one) for one in numpy.ravel(row)) for row in rows], dtype=torch.int64)
        if SCALAR:
            counts = counts.sum()
        return {"output": value, "count": counts}
'''


def echo_model(folder: Path, dtype: DataType, shape: str) -> Path:
    """A model directory that echoes one input of `shape`."""
    is_scalar = not shape.startswith("[rows")
    count_shape = "[]" if is_scalar else "[rows]"
    folder.mkdir()
    (folder / "model.py").write_text(_MODEL.replace("SCALAR", str(is_scalar)))
    (folder / "model.yaml").write_text(
        f"name: echo\nengine: python\n"
        f"inputs: [{{name: input, dtype: {dtype.name}, shape: {shape}}}]\n"
        f"outputs: [{{name: output, dtype: {dtype.name}, shape: {shape}}}, {{name: count, dtype: INT64, shape: {count_shape}}}]\n"
    )
    return folder


def content(draw: st.DrawFn, dtype: DataType, shape: tuple[int, ...]) -> bytes:
    """Random bytes of a tensor; any bit pattern, NaN payloads and -0.0 included, must survive."""
    count = 1
    for extent in shape:
        count *= extent
    if dtype is DataType.BYTES:
        return encode_bytes([draw(st.binary(max_size=9)) for _ in range(count)])
    size = count * ITEM_SIZE[dtype]
    data = draw(st.binary(min_size=size, max_size=size))
    return bytes(byte & 1 for byte in data) if dtype is DataType.BOOL else data


@st.composite
def requests(draw: st.DrawFn, dtype: DataType) -> list[Sent]:
    """Requests of few widths, so that some can share a step and others cannot."""
    sent: list[Sent] = []
    for number in range(draw(st.integers(1, 6))):
        shape = (draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 3, 3, 16])), 2)
        names = draw(st.sampled_from([(), (), ("count",), ("output",), ("count", "output")]))
        sent.append(Sent([Tensor("input", dtype, shape, content(draw, dtype, shape))], names, request_id=str(number)))
    return sent


@pytest.mark.parametrize("dtype", list(DataType))
def test_any_mix_of_requests(dtype: DataType, tmp_path_factory: pytest.TempPathFactory) -> None:
    rank = InProcess(echo_model(tmp_path_factory.mktemp("echo") / "model", dtype, "[rows, width, 2]"))

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(requests(dtype), st.sampled_from([0, 1, 5, 64]))
    def check(sent: list[Sent], segment_bytes: int) -> None:
        batched = rank.batch(sent, segment_bytes)
        assert batched == rank.alone(sent)
        for one, outcome in zip(sent, batched, strict=True):
            outputs = answered(outcome)
            assert tuple(outputs) == (tuple(one.output_names) or ("output", "count"))
            if "output" in outputs:
                assert outputs["output"].data == one.inputs[0].data
                assert outputs["output"].shape == one.inputs[0].shape
            if "count" in outputs:
                assert outputs["count"].shape == one.inputs[0].shape[:1]

    check()


@pytest.mark.parametrize("dtype", list(DataType))
def test_scalars_are_never_joined(dtype: DataType, tmp_path: Path) -> None:
    rank = InProcess(echo_model(tmp_path / "model", dtype, "[]"))
    if dtype is DataType.BYTES:
        data = [encode_bytes([b"one"]), encode_bytes([b""])]
    else:
        data = [b"\1" * ITEM_SIZE[dtype], b"\0" * ITEM_SIZE[dtype]]
    sent = [Sent([Tensor("input", dtype, (), one)]) for one in data]
    outcomes = rank.batch(sent)
    assert [answered(one)["output"].data for one in outcomes] == data
    assert [answered(one)["output"].shape for one in outcomes] == [(), ()]
    assert [answered(one)["count"].data[0] for one in outcomes] == [3 if dtype is DataType.BYTES else ITEM_SIZE[dtype], 0]


def test_bool_bytes_are_made_zero_or_one(tmp_path: Path) -> None:
    rank = InProcess(echo_model(tmp_path / "model", DataType.BOOL, "[rows, width, 2]"))
    sent = [Sent([Tensor("input", DataType.BOOL, (1, 1, 2), b"\x05\x00")]) for _ in range(2)]
    assert [answered(one)["output"].data for one in (*rank.batch(sent), *rank.alone(sent))] == [b"\1\0"] * 4
