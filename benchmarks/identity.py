"""`python -m benchmarks.identity`: what it costs to know the caller of a request: the guard, the permission and the quota, without the
transport.

Writes benchmarks/identity.md.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tensorway.access.api_keys import key_hash, new_key
from tensorway.access.permissions import Action
from tensorway.transport.port import Call, Server, UnaryHandler
from tensorway_gateway.identity.access import OPEN, Access
from tensorway_gateway.identity.audit import AuditLog
from tensorway_gateway.identity.gate import Gate
from tensorway_gateway.identity.guarded import GuardedServer

METHOD = "/tensorway.v1.InferenceService/Infer"
NUM_CALLS = 1_000
NUM_ROUNDS = 15
#: One in a mesh with many callers must cost no more.
NUM_KEYS = 1_000
ISSUER = "https://idp.example.com/"


class OneCall:
    """A call with metadata as they come off the wire; everything else is not asked for."""

    method = METHOD
    deadline = None
    peer = "ipv4:127.0.0.1:1"
    peer_names = ()

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.metadata = metadata


class OneRoute:
    """Keeps the handler as the server would call it."""

    handler: UnaryHandler

    def add_unary(self, method: str, handler: UnaryHandler) -> None:
        self.handler = handler


def path_of(access: Access) -> UnaryHandler:
    """What a request's path asks of the caller, and nothing else."""

    async def infer(message: bytes, call: Call) -> bytes:
        caller = access.caller(call)
        caller.permit(Action.INFER, "minilm")
        caller.enter()
        caller.scoped("")
        caller.leave(0.001)
        return message

    return infer


async def measure(handler: UnaryHandler, call: Any, before: Callable[[], object] = lambda: None) -> float:
    """The best round, microseconds a call: what others do on the machine only ever adds; `before` runs ahead of each and is not counted."""
    rounds = []
    for _ in range(NUM_ROUNDS):
        spent_s = 0.0
        for _ in range(NUM_CALLS):
            before()
            began_s = time.perf_counter()
            await handler(b"", call)
            spent_s += time.perf_counter() - began_s
        rounds.append(spent_s / NUM_CALLS * 1e6)
    return min(rounds)


def write_access(folder: Path, key: str) -> tuple[Path, dict[str, str]]:
    """The file, and a token by algorithm."""
    rs, es = rsa.generate_private_key(public_exponent=65537, key_size=2048), ec.generate_private_key(ec.SECP256R1())
    jwks = [
        json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rs.public_key())) | {"kid": "rs"},
        json.loads(jwt.algorithms.ECAlgorithm.to_jwk(es.public_key())) | {"kid": "es"},
    ]
    (folder / "jwks.json").write_text(json.dumps({"keys": jwks}), encoding="utf-8")
    keys = [{"name": f"other-{index}", "hashes": [key_hash(new_key())], "allow": ["infer:other"]} for index in range(NUM_KEYS - 1)]
    document = {
        "quotas": {"wide": {"requests_per_s": 1e8, "max_in_flight": 1000}},
        "keys": [{"name": "web", "hashes": [key_hash(key)], "allow": ["infer:minilm"], "quota": "wide"}, *keys],
        "issuers": [
            {"name": "corp", "issuer": ISSUER, "audience": "tensorway", "jwks": "jwks.json", "allow": ["infer:minilm"], "quota": "wide"}
        ],
    }
    path = folder / "access.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    claims = {"iss": ISSUER, "aud": "tensorway", "sub": "alice", "exp": time.time() + 3600}
    signers = (("RS256", rs), ("ES256", es))
    return path, {name: jwt.encode(claims, signer, algorithm=name, headers={"kid": name[:2].lower()}) for name, signer in signers}


async def main() -> None:
    rows: list[tuple[str, float]] = []
    bearer = "authorization"
    with tempfile.TemporaryDirectory() as folder:
        key = new_key()
        path, tokens = write_access(Path(folder), key)
        gate = Gate(str(path), AuditLog(""))
        route: Any = OneRoute()
        server: Server = route
        GuardedServer(server, gate).add_unary(METHOD, path_of(Access(gate)))
        rows.append(("no access file", await measure(path_of(OPEN), OneCall({}))))
        rows.append((f"API key (of {NUM_KEYS})", await measure(route.handler, OneCall({bearer: f"Bearer {key}"}))))
        for name, token in tokens.items():
            rows.append((f"JWT {name}, seen before", await measure(route.handler, OneCall({bearer: f"Bearer {token}"}))))
        for name, token in tokens.items():
            rows.append((f"JWT {name}, new", await measure(route.handler, OneCall({bearer: f"Bearer {token}"}), gate._forget)))
    lines = [
        "# What it costs to know a caller", "",
        "`python -m benchmarks.identity`: guard, permission and quota of one request, without the transport. "
        f"The best of {NUM_ROUNDS} rounds of {NUM_CALLS} calls; the machine is that of results.md.",
        "", "| credential | µs a request |", "| --- | ---: |",
        *(f"| {name} | {cost_us:.1f} |" for name, cost_us in rows),
    ]
    Path(__file__).with_name("identity.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
