"""Keys, tokens and access files for tests, and plain calls with credentials."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import grpc
import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from tensorway.access.api_keys import key_hash, new_key

ISSUER = "https://idp.example.com/"
AUDIENCE = "tensorway"
#: Made once: it takes a while.
SIGNER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
FORGER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_jwk(key: rsa.RSAPrivateKey = SIGNER, kid: str | None = "k1", **more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    return found | ({} if kid is None else {"kid": kid}) | more


def token(key: Any = SIGNER, algorithm: str = "RS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A genuine one unless told otherwise. A claim of None is left out."""
    now_s = time.time()
    said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now_s + 600, "iat": now_s, "scope": "mesh.echo"} | claims
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, key, algorithm=algorithm, headers={"kid": "k1"} if headers is None else headers)


def write_key_set(path: Path, *keys: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"keys": list(keys or (public_jwk(),))}))
    return path


def issuer_rule(**more: Any) -> dict[str, Any]:
    return {
        "name": "corp", "issuer": ISSUER, "audience": AUDIENCE, "jwks": "jwks.json", "scopes": {"mesh.echo": ["infer:echo"]}, "leeway_s": 0,
    } | more


class AccessFile:
    """An access file and the keys that it knows."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "access.yaml"
        self.keys: dict[str, str] = {}
        self.document: dict[str, Any] = {"keys": []}

    def add(self, name: str, *allow: str, **more: Any) -> str:
        key = self.keys[name] = new_key()
        self.document["keys"].append({"name": name, "hashes": [key_hash(key)], "allow": list(allow)} | more)
        return key

    def write(self, **sections: Any) -> Path:
        self.document |= sections
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump(self.document))
        new.replace(self.path)
        return self.path


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential}"),)


async def call(
    channel: grpc.aio.Channel, method: str, message: bytes, credential: str = "", metadata: tuple[tuple[str, str], ...] = ()
) -> tuple[str, bytes, str]:
    """Status, answer and sentence of one call with one request; of a stream, the first answer."""
    given = (*metadata, *(bearer(credential) if credential else ()))
    while True:
        found = await _call(channel, method, message, given)
        # grpc.aio's own word where the server ended a stream before the client had written: what the server said is lost.
        if found[2] != "Internal error from Core":
            return found


async def _call(channel: grpc.aio.Channel, method: str, message: bytes, given: tuple[tuple[str, str], ...]) -> tuple[str, bytes, str]:
    try:
        if method.endswith(STREAMS):
            stream = channel.stream_stream(method)(iter([message]), metadata=given, timeout=20.0)
            first = await stream.read()
            if first is grpc.aio.EOF:
                return (await stream.code()).name, b"", await stream.details()
            stream.cancel()
            return "OK", first, ""
        return "OK", await channel.unary_unary(method)(message, metadata=given, timeout=20.0), ""
    except grpc.aio.AioRpcError as error:
        return error.code().name, b"", error.details() or ""


STREAMS = ("/Generate", "/ModelStreamInfer", "/Watch", "/ServerReflectionInfo", "/Profile", "/ProfileGroup")
