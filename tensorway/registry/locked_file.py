"""A file that says something for exactly as long as its owner lives: content and an exclusive `flock` held on it.

The kernel drops the lock when the owner dies, however it dies, so a dead process loses its lease at once and nothing has to renew or
expire. Protocol (the classic one for lock files): open, lock, then check that the name still means the inode that was locked; only the
holder of the lock may unlink. Content is one line, `crc32 json`, so that a reader who catches a write half-way can tell.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Readers hold a shared lock for microseconds while they look; an owner retries for this long before it believes in a rival.
_ACQUIRE_S: Final = 0.25
_RETRY_S: Final = 0.005
MAX_CONTENT_BYTES: Final = 512 * 1024


@dataclass(slots=True)
class LockedFile:
    """A held file. Blocking calls, each of them short; use from a thread."""

    path: Path
    _fd: int

    @classmethod
    def acquire(cls, path: Path, content: bytes) -> LockedFile | None:
        """Creates or takes over `path` and fills it; None while another live process holds it."""
        give_up_at = time.monotonic() + _ACQUIRE_S
        while True:
            fd = _lock(path)
            if fd is not None:
                held = cls(path, fd)
                try:
                    held.write(content)
                except OSError:
                    held.release()
                    raise
                return held
            if time.monotonic() > give_up_at:
                return None
            time.sleep(_RETRY_S)

    def write(self, content: bytes) -> None:
        """Replaces the content; a reader sees the old or the new."""
        line = b"%08x " % zlib.crc32(content) + content + b"\n"
        os.pwrite(self._fd, line, 0)
        os.ftruncate(self._fd, len(line))

    def release(self) -> None:
        """Removes the file and lets go of the lock; harmless when repeated."""
        if self._fd < 0:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on the file now called `path`, or None."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another, or unlinked between open and lock: the caller tries again
    os.close(fd)
    return None


@dataclass(frozen=True, slots=True)
class Glance:
    """What a reader saw. `content` is None where the owner was writing: look again soon."""

    is_live: bool
    content: bytes | None


def look(path: Path) -> Glance:
    """Reads `path` without disturbing its owner; a file whose owner has died is removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Glance(False, b"")
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Glance(True, _checked(os.pread(fd, MAX_CONTENT_BYTES + 64, 0)))
        if os.fstat(fd).st_nlink and os.stat(path).st_ino == os.fstat(fd).st_ino:
            path.unlink(missing_ok=True)
        return Glance(False, b"")
    except FileNotFoundError:
        return Glance(False, b"")
    finally:
        os.close(fd)


def _checked(raw: bytes) -> bytes | None:
    line, newline, _ = raw.partition(b"\n")
    crc, _, content = line.partition(b" ")
    if not newline or b"%08x" % zlib.crc32(content) != crc:
        return None
    return content
