"""The registry's port: who is alive, what is wanted, and who may do it.

Three things, each of which a directory and Consul can both hold:

- a **registration** says "I live at this endpoint"; it lasts as long as its owner's lease;
- a **document** is a small named value (at most 512 KiB) that outlives its writer: revisions, desired state;
- a **claim** is an exclusive right, held by at most one owner at a time for as long as its lease.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

#: Kinds of registration.
GATEWAY: Final = "gateway"
ORCHESTRATOR: Final = "orchestrator"
NODE: Final = "node"
GROUP: Final = "group"

#: Document key prefixes: `revisions/MODEL/REVISION`, `desired/MODEL`, `nodes/NODE`.
REVISIONS: Final = "revisions/"
DESIRED: Final = "desired/"
NODES: Final = "nodes/"


@dataclass(frozen=True, slots=True)
class Registration:
    """A live member of the mesh. `id` is unique within its kind; metadata values are at most 512 characters (Consul's limit)."""

    kind: str
    id: str
    endpoint: str
    metadata: Mapping[str, str] = field(default_factory=dict)


class Lease(Protocol):
    """The right to stay registered, or to hold a claim."""

    async def update(self, registration: Registration) -> None:
        """Replaces what is registered (same kind and id). Meaningless for a claim."""

    async def release(self) -> None:
        """Gives it up at once; releasing twice is harmless."""

    async def wait_lost(self) -> None:
        """Returns once the right is gone though nobody gave it up: another holds the claim, after an outage or a pause of this process. A
        registration comes back by itself and is never lost; nor is what a directory holds, whose locks fall with their owner only."""


class Registry(Protocol):
    """Use as an async context manager, or call `close`; closing releases every lease taken through it."""

    async def register(self, registration: Registration) -> Lease:
        """Registers, replacing a dead owner's row of the same id. Raises FailedPrecondition while another live owner has the id."""

    async def registrations(self, kind: str) -> tuple[Registration, ...]:
        """The live registrations of `kind`, by id."""

    def watch(self, kind: str) -> AsyncIterator[tuple[Registration, ...]]:
        """Yields the live registrations at once, and again after every change. Never ends; never raises for an outage."""

    async def read(self, key: str) -> bytes | None: ...

    async def write(self, key: str, value: bytes) -> None:
        """Writes a document atomically."""

    async def create(self, key: str, value: bytes) -> bool:
        """Writes a document unless it exists; says whether it did."""

    async def replace(self, key: str, before: bytes, value: bytes) -> bool:
        """Writes a document where it still is `before`, and says whether it did: compare-and-set. What several may change at the same time
        is written by `create` and `replace` alone (see `tensorway.registry.amending`); a directory's `write` does not look at others."""

    async def delete(self, key: str) -> None: ...

    def watch_documents(self, prefix: str) -> AsyncIterator[Mapping[str, bytes]]:
        """Yields all documents under `prefix` (full keys) at once, and again after every change."""

    async def claim(self, key: str, holder: str) -> Lease | None:
        """Takes the claim for `holder`; None while another holds it."""

    def watch_claims(self, prefix: str) -> AsyncIterator[Mapping[str, str]]:
        """Yields {key: holder} of all held claims under `prefix` at once, and again after every change."""

    async def close(self) -> None: ...
