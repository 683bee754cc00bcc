"""Reading safetensors without an array library agrees with the library, and refuses what is none."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tensorway.errors import InvalidRequest
from tensorway.safetensors_file import read_safetensors
from tensorway.tensors import DataType


def test_it_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    given = {
        "a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor([1, -2], dtype=torch.int16),
        "d": torch.zeros(0, 4, dtype=torch.bfloat16), "e": torch.tensor(7, dtype=torch.int64),
    }
    save_file(given, path, {"who": "me"})
    found = read_safetensors(path)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].shape == tuple(tensor.shape)
        assert bytes(found[name].data) == bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    assert [found[name].dtype for name in "abcde"] == [DataType.FP32, DataType.BOOL, DataType.INT16, DataType.BF16, DataType.INT64]


def header(**items: object) -> bytes:
    text = json.dumps(items).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04 something else", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]",
    header(x={"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}) + b"\0",
    header(x={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"\0\0\0\0",
    header(x={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"\0\0\0\0",
    header(x={"dtype": "F32"}),
])  # fmt: skip
def test_what_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest):
        read_safetensors(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read_safetensors(tmp_path / "none")
