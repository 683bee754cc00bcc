"""Who only needs the ports does not pay for grpc."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tensorway.transport

_SCRIPT = "import sys, tensorway.transport, tensorway.transport.port; print([name for name in sys.modules if name.split('.')[0] == 'grpc'])"


def test_the_ports_import_no_grpc() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_promised_name_is_there_and_no_other() -> None:
    for name in tensorway.transport.__all__:
        assert getattr(tensorway.transport, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = tensorway.transport.Nonsense
