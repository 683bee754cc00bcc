"""Single packages of another Debian suite, unpacked into .tools without touching the machine's own apt state."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def unpack(suite: str, packages: tuple[str, ...], target: Path) -> None:
    """Downloads `packages` of `suite` from the mirror that this machine uses, and unpacks them under `target`."""
    state = target / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (state / "sources.list").write_text(f"deb [signed-by={keyring}] {_mirror()} {suite} main\n")
    options = [
        "-o", f"Dir::Etc::sourcelist={state / 'sources.list'}", "-o", "Dir::Etc::sourceparts=-",
        "-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache::archives={state / 'archives'}",
        "-o", "APT::Sandbox::User=root", "-qq",
    ]
    subprocess.run(["apt-get", *options, "update"], check=True)
    subprocess.run(["apt-get", *options, "download", *packages], check=True, cwd=state / "archives")
    for package in sorted((state / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(target)], check=True)


def _mirror() -> str:
    """The first Debian mirror in this machine's apt sources."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for source in sources:
        if source.is_file() and (found := re.search(r"https?://\S+/debian(?=\s|$)", source.read_text())):
            return found[0]
    raise FileNotFoundError("no Debian mirror in /etc/apt")
