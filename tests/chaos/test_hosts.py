"""Hosts in network namespaces: what is done to the network between them, and what is left of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.hosts import Hosts, network_obstacle, open_hosts, remove_leftovers

pytestmark = pytest.mark.skipif(bool(network_obstacle()), reason=network_obstacle() or "-")

ROOT = Path(__file__).parents[2]
NAMESPACES = Path("/run/netns")


def test_the_network_is_harmed_and_healed() -> None:
    """A connection between two hosts is refused where they are cut off by resets, times out where packets are dropped, and comes back."""
    with open_hosts(("one", "two", "three")) as hosts:
        listen = [*hosts["two"].prefix, sys.executable, "-c", _LISTEN.format(hosts["two"].address)]
        with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "listening\n"
                for harm, expected in _harms(hosts):
                    harm()
                    assert _dial(hosts, "one", "two") == expected
                    hosts.heal()
                    assert _dial(hosts, "one", "two") == "connected"
            finally:
                server.kill()


def _harms(hosts: Hosts) -> tuple[tuple[Callable[[], None], str], ...]:
    """What is done to the network, and what it makes of a connection from host one to host two."""
    return (
        (lambda: hosts.cut("one", "two", reset=True), "ConnectionRefusedError"), (lambda: hosts.cut("one", "two"), "TimeoutError"),
        (lambda: hosts.isolate("two"), "TimeoutError"), (lambda: hosts.lose("two", 1.0), "TimeoutError"),
        (lambda: hosts.slow("one", 64), "connected"), (lambda: hosts.cut("one", "three"), "connected"),
    )


_LISTEN = """
import socket
listener = socket.create_server(("{}", 7000))
print("listening", flush=True)
while True:
    listener.accept()[0].close()
"""
_DIAL = """
import socket
try:
    socket.create_connection(("{}", 7000), 0.4)
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""


_DIE = """
import os, signal
from tests.chaos.hosts import open_hosts
with open_hosts(("one",)):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _dial(hosts: Hosts, here: str, there: str) -> str:
    """What comes of connecting from one host to another."""
    words = [*hosts[here].prefix, sys.executable, "-I", "-S", "-c", _DIAL.format(hosts[there].address)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def test_what_a_killed_run_leaves_behind_is_removed(tmp_path: Path) -> None:
    """A run is killed while its hosts are there; the next one finds and removes them, and leaves those of a run that lives."""
    with open_hosts(("one",)) as living:
        with subprocess.Popen([sys.executable, "-c", _DIE], cwd=ROOT) as killed:
            killed.wait(20)
        assert any(f"-{killed.pid}-" in path.name for path in NAMESPACES.iterdir())
        remove_leftovers()
        left = {path.name for path in NAMESPACES.iterdir()}
        assert not any(f"-{killed.pid}-" in name for name in left)
        assert living["one"].namespace in left
