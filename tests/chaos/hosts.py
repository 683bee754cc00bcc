"""Hosts of a test mesh: each has an address of its own and, where root allows it, a network namespace of its own.

    hosts ──veth──┐
    hosts ──veth──┼── a bridge in a namespace of its own (the switch) ──veth── this process
    hosts ──veth──┘

Addresses are of 198.18.0.0/15, which RFC 2544 sets aside for tests; without root every host is another loopback address, and nothing can be
done to the network between them. Names begin with `twchaos-PID-`, so that what a killed run has left behind is found and
removed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tensorway.errors import FailedPrecondition

PREFIX: Final = "twchaos"
_SUBNET: Final = "198.18.{}.{}"
_LOOPBACK: Final = "127.77.{}.{}"
#: This process's own last number; hosts count from 1.
_OWN_NUMBER: Final = 254
_TIMEOUT_S: Final = 15.0
#: One process may have several meshes at once.
_NUMBERS: Final = itertools.count(1)
_TOOLS: Final = ("ip", "nsenter", "iptables", "tc")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine of the mesh, as far as the network is concerned."""

    name: str
    address: str
    #: Its network namespace; empty where it shares this process's.
    namespace: str = ""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with to run on this host. The command keeps the process id that it is started with."""
        return ("nsenter", f"--net=/run/netns/{self.namespace}") if self.namespace else ()


class Hosts:
    """All hosts by name, and what is done to the network between them."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.by_name = {host.name: host for host in hosts}
        self._are_harmed: set[str] = set()

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    @property
    def has_network(self) -> bool:
        """Whether the network between hosts can be harmed."""
        return all(host.namespace for host in self.by_name.values())

    def cut(self, one: str, other: str, *, reset: bool = False) -> None:
        """Nothing passes between two hosts: dropped in silence, or TCP answered with a reset. Both ways."""
        for here, there in ((one, other), (other, one)):
            address = self[there].address
            if reset:
                self._filter(here, "-I", "OUTPUT", "-p", "tcp", "-d", address, "-j", "REJECT", "--reject-with", "tcp-reset")
            else:
                self._filter(here, "-I", "OUTPUT", "-d", address, "-j", "DROP")

    def isolate(self, name: str) -> None:
        """Nothing passes between a host and any other, this process included."""
        self._filter(name, "-I", "OUTPUT", "!", "-o", "lo", "-j", "DROP")
        self._filter(name, "-I", "INPUT", "!", "-i", "lo", "-j", "DROP")

    def lose(self, name: str, share: float) -> None:
        """That share of the packets to a host is lost, at random."""
        self._filter(name, "-I", "INPUT", "!", "-i", "lo", "-m", "statistic", "--mode", "random", "--probability", f"{share}", "-j", "DROP")

    def slow(self, name: str, kbit_s: int) -> None:
        """What leaves a host is shaped to so many kbit/s, with up to 400 ms of queue (tc-tbf(8))."""
        self._are_harmed.add(name)
        self._on(name, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{kbit_s}kbit", "burst", "4kb", "latency", "400ms")

    def heal(self) -> None:
        """Undoes everything."""
        for name in sorted(self._are_harmed):
            self._on(name, "iptables", "-F")
            if "tbf" in self._on(name, "tc", "qdisc", "show", "dev", "eth0"):
                self._on(name, "tc", "qdisc", "del", "dev", "eth0", "root")
        self._are_harmed.clear()

    def _filter(self, name: str, *words: str) -> None:
        self._are_harmed.add(name)
        self._on(name, "iptables", *words)

    def _on(self, name: str, *words: str) -> str:
        return _run(*self[name].prefix, *words)


def network_obstacle() -> str:
    """Why hosts cannot have namespaces of their own here; empty where they can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing:
        return f"{', '.join(missing)} not found (Debian: iproute2, iptables, util-linux)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return ""


@contextmanager
def open_hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """As many hosts, in namespaces of their own where that is possible; gone with the block."""
    remove_leftovers()
    number_here = next(_NUMBERS)
    third = (os.getpid() + number_here) % 250
    if network_obstacle():
        yield Hosts([Host(name, _LOOPBACK.format(third, number)) for number, name in enumerate(names, 1)])
        return
    mark = f"{PREFIX}-{os.getpid()}-{number_here}-"
    own = f"twch{os.getpid()}x{number_here}"  # at most 15 characters
    hosts = Hosts([Host(name, _SUBNET.format(third, number), f"{mark}{name}") for number, name in enumerate(names, 1)])
    try:
        _wire(hosts, f"{mark}switch", own, third)
        yield hosts
    finally:
        _remove(mark)
        # It would go with its other end, which the kernel removes in its own time.
        subprocess.run(["ip", "link", "del", own], capture_output=True, check=False, timeout=_TIMEOUT_S)


def remove_leftovers() -> None:
    """Removes what earlier runs have left behind, those whose process still lives excepted."""
    for name in _namespaces():
        found = re.match(rf"{PREFIX}-(\d+)-", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)
    for line in Path("/proc/mounts").read_text().splitlines():
        path = line.split()[1]
        found = re.search(rf"/{PREFIX}-(\d+)-", path)
        if found and not Path(f"/proc/{found[1]}").exists():
            unmount(Path(path))


def mount_small(path: Path, num_bytes: int) -> None:
    """Mounts a tmpfs of that size. Raises FailedPrecondition where that is not permitted."""
    path.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=0700", PREFIX, str(path))


def unmount(path: Path) -> None:
    """Takes a file system away even while it is used; harmless where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(str(path).encode(), 2)  # MNT_DETACH


def _wire(hosts: Hosts, switch: str, own: str, third: int) -> None:
    """Makes the namespaces and the cables; `own` is this process's interface."""
    _run("ip", "netns", "add", switch)
    for step in (("link", "add", "br0", "type", "bridge"), ("link", "set", "br0", "up"), ("link", "set", "lo", "up")):
        _run("ip", "-n", switch, *step)
    for number, host in enumerate(hosts.by_name.values(), 1):
        _run("ip", "netns", "add", host.namespace)
        _run("ip", "link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", "name", f"port{number}", "netns", switch)
        _run("ip", "-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
        _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for interface in ("eth0", "lo"):
            _run("ip", "-n", host.namespace, "link", "set", interface, "up")
    _run("ip", "link", "add", own, "type", "veth", "peer", "name", "own", "netns", switch)
    _run("ip", "-n", switch, "link", "set", "own", "master", "br0", "up")
    _run("ip", "addr", "add", f"{_SUBNET.format(third, _OWN_NUMBER)}/24", "dev", own)
    _run("ip", "link", "set", own, "up")


def _remove(mark: str) -> None:
    """Ends what runs in namespaces whose names begin with `mark`, and removes them; the cables go with their ends."""
    for name in _namespaces():
        if name.startswith(mark):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
            for pid in pids.stdout.split():
                end_process(int(pid))
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=_TIMEOUT_S)


def end_process(pid: int) -> None:
    """SIGKILL; harmless where it has ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _run(*words: str) -> str:
    """What a command prints. Raises FailedPrecondition, with what it said, where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        raise FailedPrecondition(f"`{' '.join(words)}` ended with status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
