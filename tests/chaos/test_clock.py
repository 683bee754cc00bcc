"""A clock that jumps: what reads the wall clock sees it at once, what reads the monotonic clock or waits does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.clock import clock_environment, has_compiler, jump_clock

_TELL = """
import sys, threading, time, datetime
for line in sys.stdin:
    began = time.monotonic()
    threading.Event().wait(0.05)
    print(time.time(), datetime.datetime.now().timestamp(), time.monotonic(), time.monotonic() - began, flush=True)
"""


@pytest.mark.skipif(not has_compiler(), reason="no C compiler (cc)")
def test_only_the_wall_clock_jumps(tmp_path: Path) -> None:
    environment = {**os.environ, **clock_environment(tmp_path)}
    words, pipe = [sys.executable, "-c", _TELL], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment) as asked:
        assert asked.stdin is not None
        assert asked.stdout is not None
        try:
            told = []
            for shift in (0, 86_400, -86_400, 0):
                jump_clock(tmp_path, shift)
                asked.stdin.write("now\n")
                asked.stdin.flush()
                told.append(tuple(map(float, asked.stdout.readline().split())))
        finally:
            asked.kill()
    first = told[0]
    for shift, (wall, date, monotonic, waited) in zip((0, 86_400, -86_400, 0), told, strict=True):
        assert abs(wall - first[0] - shift) < 30
        assert abs(date - wall) < 1
        assert 0 <= monotonic - first[2] < 30
        assert 0.04 < waited < 20
