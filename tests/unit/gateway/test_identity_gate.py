"""The gate with an issuer that publishes its keys by URL: what was believed is forgotten when the keys change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from tensorway_gateway.identity import gate as gates
from tensorway_gateway.identity.audit import AuditLog
from tensorway_gateway.identity.gate import Gate
from tensorway_gateway.identity.refusals import CredentialRefused
from tests.contract.gateway.identities import FORGER, AccessFile, issuer_rule, public_jwk, token


@asynccontextmanager
async def publishing(keys: list[dict[str, Any]]) -> AsyncIterator[str]:
    """The URL of a key set that holds what `keys` holds."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"keys": keys})

    application = web.Application()
    application.router.add_get("/jwks", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def running(access: AccessFile) -> AsyncIterator[Gate]:
    gate = Gate(str(access.path), AuditLog(""))
    task = asyncio.ensure_future(gate.run())
    try:
        yield gate
    finally:
        task.cancel()
        await asyncio.wait({task})


def call_with(credential: str) -> Any:
    return SimpleNamespace(metadata={"authorization": f"Bearer {credential}"}, method="/m", peer="p", peer_names=())


async def principal(gate: Gate, credential: str) -> str:
    call = call_with(credential)
    return (gate.known(call) or await gate.identify(call)).principal


async def test_a_withdrawn_signing_key_ends_what_it_proved(tmp_path: Path) -> None:
    keys = [public_jwk(), public_jwk(FORGER, "k2")]
    async with publishing(keys) as url:
        access = AccessFile(tmp_path)
        access.write(issuers=[issuer_rule(jwks=url, refresh_s=1, min_pause_s=0.1)])
        async with running(access) as gate:
            assert await principal(gate, token()) == "jwt:corp:alice"
            given = token()
            assert gate.known(call_with(given)) is None
            assert await principal(gate, given) == "jwt:corp:alice"
            assert gate.known(call_with(given)) is not None
            # The issuer withdraws the key: the regular refresh finds out, without a caller's help.
            del keys[0]
            async with asyncio.timeout(20):
                while gate.known(call_with(given)) is not None:
                    await asyncio.sleep(0.05)
            with pytest.raises(CredentialRefused, match="does not publish"):
                await gate.identify(call_with(given))
            # The file changes elsewhere: the issuer's keys are kept, and nothing is fetched that was there.
            key = access.add("web", "infer:echo")
            access.write()
            async with asyncio.timeout(20):
                while gate.known(call_with(key)) is None:
                    await asyncio.sleep(0.02)
            assert await principal(gate, token(FORGER, headers={"kid": "k2"})) == "jwt:corp:alice"
            assert gate.num_reloads["ok"] >= 1


async def test_a_token_is_believed_for_as_long_as_it_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = gates.time.time()
    monkeypatch.setattr(gates.time, "time", lambda: now_s)
    async with publishing([public_jwk()]) as url:
        access = AccessFile(tmp_path)
        key = access.add("web", "infer:echo", not_after="2100-01-01T00:00:00Z")
        access.write(issuers=[issuer_rule(jwks=url)])
        gate = Gate(str(access.path), AuditLog(""))
        given = token(exp=now_s + 60)
        await principal(gate, given)
        now_s += 59
        assert gate.known(call_with(given)) is not None
        now_s += 2
        with pytest.raises(CredentialRefused, match="has expired"):
            gate.known(call_with(given))
        now_s = 4.2e9
        with pytest.raises(CredentialRefused, match="key:web has expired"):
            gate.known(call_with(key))


async def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_MAX_REMEMBERED", 8)
    async with publishing([public_jwk()]) as url:
        access = AccessFile(tmp_path)
        key = access.add("web", "infer:echo")
        access.write(issuers=[issuer_rule(jwks=url)])
        gate = Gate(str(access.path), AuditLog(""))
        for index in range(40):
            assert await principal(gate, token(sub=f"user-{index}")) == f"jwt:corp:user-{index}"
        assert len(gate._known) <= 9
        assert gate.known(call_with(key)) is not None, "keys are never dropped"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"authorization": "Bearer a", "x-api-key": "b"}, "send one"),
        ({"authorization": "Basic dXNlcjpwYXNz"}, "must be `Bearer"),
        ({"authorization": "Bearer "}, "empty"),
        ({"authorization": ""}, "must be `Bearer"),
        ({"x-api-key": ""}, "empty"),
        ({"x-api-key": b"\xff"}, "no text"),
        ({}, "no credential was sent"),
    ],
)  # fmt: skip
def test_what_is_no_credential_is_refused(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    access = AccessFile(tmp_path)
    access.add("web", "infer:echo")
    gate = Gate(str(access.write()), AuditLog(""))
    with pytest.raises(CredentialRefused, match=said):
        gate.known(SimpleNamespace(metadata=metadata, peer_names=("other.tensorway.internal",)))  # type: ignore[arg-type]
