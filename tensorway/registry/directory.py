"""The directory adapter: a registry for one machine that needs no server.

    ROOT/registrations/KIND/ID     a locked file (see locked_file): live for as long as its owner
    ROOT/claims/KEY                a locked file whose content is the holder
    ROOT/documents/KEY             a plain file, replaced atomically
    ROOT/changes/KEY               a locked file, for as long as a document is compared and replaced

Watchers sleep in inotify. The kernel reports a dying owner as a close after writing, just before it drops the lock; hence the short second
look after an event. Keys and ids are percent-encoded into flat file names.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final, Self, TypeVar
from urllib.parse import quote, unquote

from asyncinotify import Inotify, Mask

from tensorway.errors import FailedPrecondition, Unavailable
from tensorway.registry.locked_file import MAX_CONTENT_BYTES, LockedFile, look
from tensorway.registry.outages import OUTAGES
from tensorway.registry.port import Lease, Registration

_LOG = logging.getLogger(__name__)
_CHANGES: Final = Mask.CREATE | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.DELETE | Mask.MOVED_TO
#: The kernel tells of a close before it drops the lock; a second look after this long sees the truth.
_SETTLE_S: Final = 0.02
#: A safety net under inotify (an overflowed queue): look anyway after this long.
_LOOK_ANYWAY_S: Final = 5.0

T = TypeVar("T")


class DirectoryRegistry:
    """Implements `tensorway.registry.port.Registry` on a directory of this machine."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self._leases: set[_DirectoryLease] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def register(self, registration: Registration) -> Lease:
        path = self._folder("registrations", registration.kind) / _file_name(registration.id)
        lease = await self._acquire(path, _encode(registration))
        if lease is None:
            raise FailedPrecondition(f"{registration.kind} {registration.id!r} is already registered by a live process", field="id")
        return lease

    async def registrations(self, kind: str) -> tuple[Registration, ...]:
        folder = self._folder("registrations", kind)
        try:
            found, _ = await asyncio.to_thread(_scan_locked, folder)
        except OSError as error:
            raise _failed(f"registry {folder} cannot be read: {error}") from error
        return _decode_all(found)

    async def watch(self, kind: str) -> AsyncIterator[tuple[Registration, ...]]:
        async with aclosing(self._watch(self._folder("registrations", kind), _scan_locked)) as scans:
            async for found in scans:
                yield _decode_all(found)

    async def read(self, key: str) -> bytes | None:
        path = self._folder("documents") / _file_name(key)
        try:
            return await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed(f"registry document {key!r} cannot be read: {error}") from error

    async def write(self, key: str, value: bytes) -> None:
        await self._place(key, value, os.replace)

    async def create(self, key: str, value: bytes) -> bool:
        try:
            await self._place(key, value, os.link)
        except FileExistsError:
            return False
        return True

    async def replace(self, key: str, before: bytes, value: bytes) -> bool:
        _check_size(key, value)
        lease = await self._acquire(self._folder("changes") / _file_name(key), b"")
        if lease is None:
            return False  # another is changing it at this moment
        try:
            if await self.read(key) != before:
                return False
            await self.write(key, value)
            return True
        finally:
            await lease.release()

    async def delete(self, key: str) -> None:
        path = self._folder("documents") / _file_name(key)
        try:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except OSError as error:
            raise _failed(f"registry document {key!r} cannot be deleted: {error}") from error

    async def watch_documents(self, prefix: str) -> AsyncIterator[Mapping[str, bytes]]:
        def scan(folder: Path) -> tuple[dict[str, bytes], bool]:
            return _scan_documents(folder, prefix), False

        async with aclosing(self._watch(self._folder("documents"), scan)) as scans:
            async for found in scans:
                yield found

    async def claim(self, key: str, holder: str) -> Lease | None:
        return await self._acquire(self._folder("claims") / _file_name(key), holder.encode())

    async def watch_claims(self, prefix: str) -> AsyncIterator[Mapping[str, str]]:
        async with aclosing(self._watch(self._folder("claims"), _scan_locked)) as scans:
            async for found in scans:
                yield {key: holder.decode() for key, holder in found.items() if key.startswith(prefix)}

    async def close(self) -> None:
        for lease in tuple(self._leases):
            await lease.release()

    def _folder(self, *parts: str) -> Path:
        folder = self._root.joinpath(*parts)
        try:
            # Whoever may write here may claim to be part of the mesh: private to the user.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = self._root.stat()
        except OSError as error:
            raise _failed(f"registry directory {folder} cannot be made: {error}") from error
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise FailedPrecondition(
                f"registry directory {self._root} can be written by others (owner {state.st_uid}, mode {state.st_mode & 0o777:o}): "
                "whoever can write there can pose as a part of the mesh; use a directory of your own with mode 0700", field="registry",
            )
        return folder

    async def _acquire(self, path: Path, content: bytes) -> _DirectoryLease | None:
        _check_size(str(path), content)
        try:
            held = await asyncio.to_thread(LockedFile.acquire, path, content)
        except OSError as error:
            raise _failed(f"registry file {path} cannot be written: {error}") from error
        if held is None:
            return None
        lease = _DirectoryLease(held, self._leases)
        self._leases.add(lease)
        return lease

    async def _place(self, key: str, value: bytes, put: Callable[[str, Path], None]) -> None:
        _check_size(key, value)
        path = self._folder("documents") / _file_name(key)
        try:
            await asyncio.to_thread(_place_file, path, value, put)
        except FileExistsError:
            raise
        except OSError as error:
            raise _failed(f"registry document {key!r} cannot be written: {error}") from error

    async def _watch(self, folder: Path, scan: Callable[[Path], tuple[dict[str, T], bool]]) -> AsyncGenerator[dict[str, T], None]:
        """Yields what `scan` finds in `folder` at once and after every change of it."""
        with Inotify() as inotify:
            inotify.add_watch(folder, _CHANGES)
            last: dict[str, T] | None = None
            while True:
                try:
                    found, look_again = await asyncio.to_thread(scan, folder)
                except OSError as error:
                    OUTAGES.num_errors += 1
                    _LOG.warning("registry %s cannot be read, keeping what is known: %s", folder, error)
                    found, look_again = last if last is not None else {}, False
                if found != last:
                    last = found
                    yield dict(found)
                await _wait_for_change(inotify, _SETTLE_S if look_again else _LOOK_ANYWAY_S)


async def _wait_for_change(inotify: Inotify, timeout_s: float) -> None:
    """Returns after the next change (and what follows it closely), or after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await inotify.get()
    except TimeoutError:
        return
    # One change is often several events, and a dead owner's lock falls a moment after its event.
    await asyncio.sleep(_SETTLE_S)
    try:
        async with asyncio.timeout(0):
            while True:
                await inotify.get()
    except TimeoutError:
        return


def _failed(why: str) -> Unavailable:
    OUTAGES.num_errors += 1
    return Unavailable(why, field="registry")


class _DirectoryLease:
    """A held file and its place in the registry's list of leases."""

    def __init__(self, held: LockedFile, leases: set[_DirectoryLease]) -> None:
        self._held = held
        self._leases = leases

    async def update(self, registration: Registration) -> None:
        content = _encode(registration)
        _check_size(registration.id, content)
        try:
            await asyncio.to_thread(self._held.write, content)
        except OSError as error:
            raise _failed(f"registration {registration.id!r} cannot be written: {error}") from error

    async def release(self) -> None:
        self._leases.discard(self)
        await asyncio.to_thread(self._held.release)

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()  # the kernel takes a lock from nobody who lives


def _file_name(key: str) -> str:
    return key.replace(".", "%2E") if key in (".", "..") else quote(key, safe="")


def _check_size(name: str, value: bytes) -> None:
    if len(value) > MAX_CONTENT_BYTES:
        raise FailedPrecondition(f"registry value {name!r} has {len(value)} bytes, more than {MAX_CONTENT_BYTES}")


def _encode(registration: Registration) -> bytes:
    return json.dumps({
        "kind": registration.kind, "id": registration.id, "endpoint": registration.endpoint, "metadata": dict(registration.metadata),
    }).encode()


def _decode_all(found: Mapping[str, bytes]) -> tuple[Registration, ...]:
    return tuple(Registration(**json.loads(content)) for _, content in sorted(found.items()))


def _scan_locked(folder: Path) -> tuple[dict[str, bytes], bool]:
    """Content of every live file by key, and whether one was caught half-written."""
    found: dict[str, bytes] = {}
    look_again = False
    for path in folder.iterdir():
        glance = look(path)
        if glance.is_live and glance.content is not None:
            found[unquote(path.name)] = glance.content
        look_again |= glance.is_live and glance.content is None
    return found, look_again


def _scan_documents(folder: Path, prefix: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in folder.iterdir():
        key = unquote(path.name)
        if key.startswith(prefix):
            try:
                found[key] = path.read_bytes()
            except FileNotFoundError:
                continue  # deleted since it was listed
    return found


def _place_file(path: Path, value: bytes, put: Callable[[str, Path], None]) -> None:
    """Writes `value` beside its place and moves or links it there in one step. Temporary names start with a dot, like no key."""
    fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(value)
        put(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
