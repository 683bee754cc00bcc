"""A registry directory that cannot be used says so as every outage does: with UNAVAILABLE and its name, never with a bare OSError."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from tensorway.errors import Unavailable
from tensorway.registry import open_registry
from tensorway.registry.port import NODE, Registration, Registry

OPERATIONS: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "read": lambda registry: registry.read("k"),
    "write": lambda registry: registry.write("k", b"v"),
    "create": lambda registry: registry.create("other", b"v"),
    "replace": lambda registry: registry.replace("k", b"", b"v"),
    "delete": lambda registry: registry.delete("k"),
    "registrations": lambda registry: registry.registrations(NODE),
    "register": lambda registry: registry.register(Registration(NODE, "n", "a:1")),
    "claim": lambda registry: registry.claim("c", "me"),
}


async def failures(registry: Registry) -> set[str]:
    found = set()
    for name, operation in OPERATIONS.items():
        try:
            await operation(registry)
        except Unavailable as error:
            assert error.field == "registry"
            found.add(name)
    return found


async def test_every_operation_on_a_broken_directory_is_unavailable(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    async with open_registry(f"directory:{root}") as registry:
        await registry.write("k", b"v")
        root.rename(tmp_path / "aside")
        root.write_text("")
        assert await failures(registry) == set(OPERATIONS)
        root.unlink()
        (tmp_path / "aside").rename(root)
        assert await registry.read("k") == b"v"


async def test_what_is_no_file_is_unavailable(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    for path in ("documents/k", f"registrations/{NODE}/n"):
        (root / path).mkdir(parents=True)
    root.chmod(0o700)
    async with open_registry(f"directory:{root}") as registry:
        assert await failures(registry) == set(OPERATIONS) - {"create", "claim"}
