"""The public keys of an issuer: a JSON Web Key Set (RFC 7517) from a file, a URL or where the issuer says; or one secret."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import jwt
from cryptography.exceptions import UnsupportedAlgorithm

from tensorway.access.schema import IssuerRule, beside
from tensorway.errors import FailedPrecondition, Unavailable
from tensorway_gateway.identity.discovery import Provider, parse_provider
from tensorway_gateway.identity.download import download, shown

_LOG = logging.getLogger(__name__)
#: After a fetch that failed: sooner than the next regular one.
_RETRY_S: Final = 10.0
_MIN_RSA_BITS: Final = 2048
_MIN_SECRET_BYTES: Final = 32
#: Algorithm -> key type and curve (RFC 7518, section 3.1; RFC 8037).
_CURVES: Final = {"ES256": ("P-256",), "ES384": ("P-384",), "ES512": ("P-521",), "EdDSA": ("Ed25519", "Ed448")}

#: What one key of a set can raise: whatever an issuer writes there, it costs that key and no more. `alg: none` is not implemented.
_UNUSABLE: Final = (ValueError, TypeError, KeyError, NotImplementedError, RecursionError, UnsupportedAlgorithm, jwt.PyJWTError)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One key of a set."""

    #: "" where the set does not say.
    kid: str
    kind: str
    curve: str
    #: The only algorithm that it is for; "" where the set does not say.
    algorithm: str
    key: Any

    def fits(self, algorithm: str) -> bool:
        """Whether a signature by this algorithm can be this key's."""
        if self.algorithm not in ("", algorithm):
            return False
        curves = _CURVES.get(algorithm)
        return self.kind == "RSA" and algorithm[:2] in ("RS", "PS") if curves is None else self.curve in curves


def parse_key_set(document: bytes, where: str) -> tuple[SigningKey, ...]:
    """The keys that can check signatures; others, and what is too weak, are left out with a line in the log. Raises FailedPrecondition
    where there is none."""
    try:
        listed = json.loads(document)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FailedPrecondition(f"{where}: is no JSON Web Key Set ({type(error).__name__})", field="jwks") from None
    keys: list[SigningKey] = []
    for index, item in enumerate(listed if isinstance(listed, list) else []):
        try:
            keys.append(_parse_key(item))
        except _UNUSABLE as error:
            _LOG.warning("%s: key %d is left out: %s: %s", where, index, type(error).__name__, error)
    if not keys:
        raise FailedPrecondition(f"{where}: holds no key that a token can be checked with", field="jwks")
    return tuple(keys)


def _parse_key(item: Any) -> SigningKey:
    kind = item.get("kty") if isinstance(item, dict) else None
    # Never "oct": a secret in a public key set is known to everybody.
    if kind not in ("RSA", "EC", "OKP"):
        raise ValueError(f"its type is {kind!r}, not RSA, EC or OKP")
    if item.get("use", "sig") != "sig":
        raise ValueError("it is not for signatures")
    if any(private in item for private in ("d", "p", "q")):
        raise ValueError("it is a private key, which does not belong here; make a new one")
    algorithm = str(item.get("alg", ""))
    curve = str(item.get("crv", ""))
    default = "RS256" if kind == "RSA" else next((name for name, curves in _CURVES.items() if curve in curves), "")
    key = jwt.PyJWK(dict(item), algorithm=algorithm or default).key
    if kind == "RSA" and key.key_size < _MIN_RSA_BITS:
        raise ValueError(f"it has {key.key_size} bits, fewer than {_MIN_RSA_BITS}")
    return SigningKey(str(item.get("kid", "")), kind, curve, algorithm, key)


class KeySet:
    """The keys of one issuer, as last read. `on_change` is called in the loop when they are others than before."""

    def __init__(self, rule: IssuerRule, path: Path, on_change: Callable[[], None], before: KeySet | None = None) -> None:
        """`path` is that of the access file; `before` the set of the same issuer under the file's last version, whose keys serve until
        others are fetched. Raises FailedPrecondition where a file cannot be used."""
        self.rule: Final = rule
        #: What is asked for keys, or for where they are; "" where nothing is fetched.
        self.url: Final = rule.discovery_url or (rule.jwks if "://" in rule.jwks else "")
        self._ca_file = str(beside(path, rule.ca_file)) if rule.ca_file else None
        self._on_change = on_change
        self._fetching = asyncio.Lock()
        self._tried_s = float("-inf")
        #: What the issuer said last of itself; None where it was not asked, or has not answered yet.
        self._provider: Provider | None = None
        self.files: tuple[Path, ...] = ()
        self.keys: tuple[SigningKey, ...] = ()
        self.secret = b""
        if rule.secret_file:
            self.files = (beside(path, rule.secret_file),)
            self.secret = _read(self.files[0]).strip()
            if len(self.secret) < _MIN_SECRET_BYTES:
                raise FailedPrecondition(f"{self.files[0]}: holds fewer than {_MIN_SECRET_BYTES} bytes", field="secret_file")
        elif not self.url:
            self.files = (beside(path, rule.jwks),)
            self.keys = parse_key_set(_read(self.files[0]), str(self.files[0]))
        elif before is not None and before.rule == rule:
            self.keys, self._tried_s, self._provider = before.keys, before._tried_s, before._provider

    def find(self, kid: str | None, algorithm: str) -> SigningKey | None:
        """The key that is named; without a name, the only one that fits."""
        fitting = [key for key in self.keys if key.fits(algorithm) and kid in (None, key.kid)]
        return fitting[0] if len(fitting) == 1 else None

    async def run(self) -> None:
        """Fetches the keys of a URL now and then, until cancelled."""
        while self.url:
            async with self._fetching:
                has_fetched = await self._fetch()
            await asyncio.sleep(self.rule.refresh_s if has_fetched else min(_RETRY_S, self.rule.refresh_s))

    async def find_anew(self, kid: str | None, algorithm: str) -> SigningKey | None:
        """`find`, after fetching the set again where that may help and is not too soon. Raises Unavailable where no keys are known yet."""
        found = self.find(kid, algorithm)
        if found is not None or not self.url:
            return found
        # Who waited here for somebody else's fetch has its result, and it is too soon for another.
        async with self._fetching:
            if time.monotonic() - self._tried_s >= self.rule.min_pause_s:
                await self._fetch()
        if not self.keys:
            raise Unavailable(f"the keys of issuer {self.rule.name!r} could not be fetched yet", retry_after_s=1.0)
        return self.find(kid, algorithm)

    async def _fetch(self) -> bool:
        """Whether there was an answer; without, what is known stays. Only one at a time."""
        self._tried_s = time.monotonic()
        try:
            keys = await self._published()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, FailedPrecondition) as error:
            _LOG.warning("the keys of issuer %s could not be fetched: %s: %s", self.rule.name, type(error).__name__, error)
            return False
        has_changed = {(key.kid, _numbers(key)) for key in keys} != {(key.kid, _numbers(key)) for key in self.keys}
        self.keys = keys
        if has_changed:
            _LOG.info("issuer %s publishes %d keys", self.rule.name, len(keys))
            self._on_change()
        return True

    async def _published(self) -> tuple[SigningKey, ...]:
        """What the issuer publishes now. Raises FailedPrecondition for documents that do not serve, and what `download` raises."""
        tls: ssl.SSLContext | bool = True
        if self._ca_file is not None:
            tls = await asyncio.to_thread(ssl.create_default_context, cafile=self._ca_file)
        async with aiohttp.ClientSession() as session:
            where = self.url
            if self.rule.discovery_url:
                # Each time: an issuer may move its key set.
                provider = parse_provider(await download(session, where, tls), self.rule)
                self._note(provider)
                where = provider.jwks_uri
            return parse_key_set(await download(session, where, tls), shown(where))

    def _note(self, provider: Provider) -> None:
        """Tells what the issuer says of itself, once for each time that it says something else."""
        if provider == self._provider:
            return
        self._provider = provider
        _LOG.info("issuer %s says that its keys are at %s", self.rule.name, shown(provider.jwks_uri))
        if not provider.signs_for(self.rule):
            _LOG.warning(
                "issuer %s says that it signs with %.200s, none of which is among the algorithms of the access file: %s",
                self.rule.name, ", ".join(sorted(provider.algorithms)), ", ".join(self.rule.algorithms),
            )


def _numbers(key: SigningKey) -> object:
    """What tells two public keys apart."""
    numbers = getattr(key.key, "public_numbers", None)
    return key.key.public_bytes_raw() if numbers is None else numbers()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"{path}: cannot be read: {error.strerror}", field="access_file") from error
