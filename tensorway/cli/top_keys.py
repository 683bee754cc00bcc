"""The keys of `tensorway top`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from typing import Any, Self


class Keys:
    """Reads single keys from a terminal while it is entered, and leaves the terminal as it was. Enter it in the loop.

    q and Ctrl-C set `is_over`; s adds to `num_orders`. Where standard input is no terminal, only Ctrl-C (SIGINT) counts.
    """

    def __init__(self) -> None:
        self.is_over = asyncio.Event()
        #: Set by every key that means something.
        self.is_pressed = asyncio.Event()
        self.num_orders = 0
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        if sys.stdin.isatty():
            descriptor = sys.stdin.fileno()
            self._before = termios.tcgetattr(descriptor)
            tty.setcbreak(descriptor)
            loop.add_reader(descriptor, self._read, descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if self._before is not None:
            loop.remove_reader(sys.stdin.fileno())
            with contextlib.suppress(termios.error):  # the terminal may be gone
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)

    def _read(self, descriptor: int) -> None:
        pressed = os.read(descriptor, 64)
        if not pressed:
            self._end()
        for key in pressed.decode(errors="replace"):
            if key in "qQ":
                self._end()
            elif key in "sS":
                self.num_orders += 1
                self.is_pressed.set()

    def _end(self) -> None:
        self.is_over.set()
        self.is_pressed.set()
