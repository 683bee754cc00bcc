"""API keys: 256 random bits with a prefix that secret scanners find and a checksum that tells a whole key from a cut one.

`twk_` + 43 base-62 digits + 6 base-62 digits of their CRC-32. Kept at rest as a plain SHA-256: a key has far more than the 112 bits above
which NIST SP 800-63B (5.1.2.2, look-up secrets) asks for an approved one-way function and neither salt nor slow hashing. Those protect what
people choose, which can be guessed; a guess at 256 random bits is hopeless at any speed. And a hash without salt can be looked up, so that
many keys cost no more than one.
"""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib
from typing import Final

PREFIX: Final = "twk_"
HASH_PREFIX: Final = "sha256:"
_DIGITS: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_NUM_RANDOM: Final = 43
_NUM_CHECK: Final = 6


def new_key() -> str:
    """A key that nobody has had before."""
    # 62**43 is a little more than 2**256.
    random = _base62(secrets.randbits(256), _NUM_RANDOM)
    return f"{PREFIX}{random}{_check(random)}"


def is_whole(key: str) -> bool:
    """Whether this can be a key: its prefix, length and checksum are right."""
    random, check = key[len(PREFIX) : -_NUM_CHECK], key[-_NUM_CHECK:]
    return key.startswith(PREFIX) and len(random) == _NUM_RANDOM and key.isascii() and check == _check(random)


def digest(credential: str) -> bytes:
    """SHA-256 of a credential, by which it is looked up."""
    return hashlib.sha256(credential.encode("utf-8", "surrogatepass")).digest()


def key_hash(key: str) -> str:
    """How the access file writes a key down: `sha256:` and 64 hexadecimal digits."""
    return HASH_PREFIX + digest(key).hex()


def _check(random: str) -> str:
    return _base62(zlib.crc32(random.encode()), _NUM_CHECK)


def _base62(number: int, num_digits: int) -> str:
    digits = ""
    for _ in range(num_digits):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits
