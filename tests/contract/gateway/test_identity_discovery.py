"""An issuer that says itself where its keys are: OpenID Connect discovery, against real servers that speak HTTP and HTTPS."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiohttp import web

from tensorway.access.schema import IssuerRule
from tensorway.cli.certs import Authority
from tensorway.errors import Unavailable
from tensorway.tensors import DataType
from tensorway.v1 import inference_pb2
from tensorway_gateway.identity.audit import AuditLog
from tensorway_gateway.identity.gate import Gate
from tensorway_gateway.identity.key_sets import KeySet
from tensorway_gateway.identity.refusals import CredentialRefused
from tests.contract.gateway.identities import FORGER, AccessFile, call, issuer_rule, public_jwk, token
from tests.contract.gateway.scripted import ECHO, running_mesh

DISCOVERY = "/realm/.well-known/openid-configuration"
INFER = "/tensorway.v1.InferenceService/Infer"


@dataclass(slots=True)
class Answer:
    """What a provider says at one path."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Provider:
    """An OpenID provider whose realm is at /realm; a test writes its documents. It has a port from the first, and answers once started."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        # Bound and not listening: connections are refused, and nobody else takes the port.
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.origin = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._socket.getsockname()[1]}"
        self.issuer = f"{self.origin}/realm"
        self.answers: dict[str, Answer] = {}
        self.num_asked: Counter[str] = Counter()
        self._runner: web.AppRunner | None = None
        self.publish("/keys", public_jwk())

    def describe(self, **more: Any) -> None:
        """Writes the realm's document; a field of None is left out."""
        said = {"issuer": self.issuer, "jwks_uri": f"{self.origin}/keys"} | more
        self.answers[DISCOVERY] = Answer(json.dumps({name: value for name, value in said.items() if value is not None}).encode())

    def publish(self, path: str, *keys: dict[str, Any]) -> None:
        """A key set at `path`, and nowhere else, which the realm's document names."""
        self.answers = {path: Answer(json.dumps({"keys": keys}).encode())}
        self.describe(jwks_uri=f"{self.origin}{path}")

    async def start(self) -> None:
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket, ssl_context=self._tls).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._socket.close()

    async def _answer(self, request: web.Request) -> web.Response:
        self.num_asked[request.path] += 1
        answer = self.answers.get(request.path, Answer(status=404))
        return web.Response(body=answer.body, status=answer.status, headers=answer.headers)


@asynccontextmanager
async def providing(tls: ssl.SSLContext | None = None) -> AsyncIterator[Provider]:
    """A provider that answers."""
    provider = Provider(tls)
    try:
        await provider.start()
        yield provider
    finally:
        await provider.stop()


def rule_of(provider: Provider, **more: Any) -> dict[str, Any]:
    return issuer_rule(issuer=provider.issuer, jwks="", min_pause_s=0.1) | more


def gate_of(folder: Path, *rules: dict[str, Any]) -> Gate:
    access = AccessFile(folder)
    return Gate(str(access.write(issuers=list(rules))), AuditLog(""))


@asynccontextmanager
async def running(gate: Gate) -> AsyncIterator[None]:
    task = asyncio.ensure_future(gate.run())
    try:
        yield
        assert not task.done(), "what a provider says must not end the gate"
    finally:
        task.cancel()
        await asyncio.wait({task})


def bearer_call(credential: str) -> Any:
    return SimpleNamespace(metadata={"authorization": f"Bearer {credential}"}, method="/m", peer="p", peer_names=())


async def principal(gate: Gate, credential: str) -> str:
    return (gate.known(bearer_call(credential)) or await gate.identify(bearer_call(credential))).principal


async def until(is_so: Callable[[], bool]) -> None:
    """For what has no event."""
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.02)


async def test_a_token_of_a_discovered_issuer_opens_the_gateway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Over HTTPS, with the provider's own authority, which vouches for both of its documents, and through real gRPC."""
    caplog.set_level(logging.INFO)
    certificate, key = Authority.open_or_make(tmp_path).issue("gateway", ("127.0.0.1",), datetime.timedelta(days=1))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with providing(tls) as provider:
        provider.issuer += "/"
        provider.describe(id_token_signing_alg_values_supported=["RS256"])
        access = AccessFile(tmp_path)
        access.write(issuers=[rule_of(provider, ca_file="ca.pem")])
        settings: dict[str, object] = {"access_file": str(access.path)}
        request = inference_pb2.InferRequest(model="echo")
        request.inputs.add(name="x", dtype=DataType.FP32, shape=[1, 2], data=bytes(8))
        async with running_mesh(tmp_path, settings=settings, specs=(ECHO,)) as mesh, grpc.aio.insecure_channel(mesh.endpoint) as channel:
            status, _, sentence = await call(channel, INFER, request.SerializeToString(), token(iss=provider.issuer))
            assert status == "OK", sentence
            for false in (token(FORGER, iss=provider.issuer), token(iss=provider.issuer.rstrip("/"))):
                assert (await call(channel, INFER, request.SerializeToString(), false))[0] == "UNAUTHENTICATED"
        assert provider.num_asked.keys() == {DISCOVERY, "/keys"}
        assert f"its keys are at {provider.origin}/keys" in caplog.text
        assert "none of which" not in caplog.text
        # Without that authority nothing of it is believed.
        with pytest.raises(Unavailable):
            await principal(gate_of(tmp_path, rule_of(provider)), token(iss=provider.issuer))
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def _described(**more: Any) -> Callable[[Provider], None]:
    return lambda provider: provider.describe(**more)


def _at(path: str, body: bytes = b"", status: int = 200, **headers: str) -> Callable[[Provider], None]:
    return lambda provider: provider.answers.update({path: Answer(body, status, headers)})


FALSE: dict[str, tuple[Callable[[Provider], None], str]] = {
    "another issuer": (_described(issuer="https://idp.example.com/"), "its issuer is 'https://idp.example.com/', not"),
    "slash too many": (lambda provider: provider.describe(issuer=provider.issuer + "/"), "to the letter"),
    "no issuer": (_described(issuer=None), "its issuer is no text"),
    "issuer is a list": (lambda provider: provider.describe(issuer=[provider.issuer]), "its issuer is no text"),
    "no jwks_uri": (_described(jwks_uri=None), "its jwks_uri must be"),
    "jwks_uri is a number": (_described(jwks_uri=7), "its jwks_uri must be"),
    "plain http elsewhere": (_described(jwks_uri="http://idp.example.com/keys"), "its jwks_uri must be"),
    "a file": (_described(jwks_uri="file:///etc/passwd"), "its jwks_uri must be"),
    "a path": (_described(jwks_uri="/keys"), "its jwks_uri must be"),
    "an endless jwks_uri": (_described(jwks_uri="https://127.0.0.1/" + "x" * 3000), "at most 2048 characters"),
    "no JSON": (_at(DISCOVERY, b"<html>"), "is no JSON"),
    "deeply nested": (_at(DISCOVERY, b"[" * 200_000), "is no JSON (RecursionError)"),
    "no object": (_at(DISCOVERY, b"[]"), "is no JSON object"),
    "oversized": (_at(DISCOVERY, b" " * 1_100_000), "openid-configuration is longer than 1048576 bytes"),
    "redirected": (_at(DISCOVERY, status=302, Location="/keys"), "openid-configuration answered 302; redirects are not followed"),
    "not found": (_at(DISCOVERY, status=404), "openid-configuration answered 404"),
    "key set redirected": (_at("/keys", status=307, Location="/elsewhere"), "/keys answered 307; redirects are not followed"),
    "key set oversized": (_at("/keys", b" " * 1_100_000), "/keys is longer than 1048576 bytes"),
    "key set nested": (_at("/keys", b"[" * 200_000), "/keys: is no JSON Web Key Set"),
    "key set withdrawn": (_at("/keys", b'{"keys": []}'), "/keys: holds no key"),
}


@pytest.mark.parametrize("kind", FALSE)
async def test_what_a_provider_must_not_say_gives_no_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    spoil, said = FALSE[kind]
    async with providing() as provider:
        spoil(provider)
        gate = gate_of(tmp_path, rule_of(provider))
        with pytest.raises(Unavailable, match="'corp' could not be fetched yet"):
            await principal(gate, token(iss=provider.issuer))
        assert said in caplog.text
        assert set(provider.num_asked) == ({DISCOVERY, "/keys"} if kind.startswith("key set") else {DISCOVERY})


async def test_a_provider_moves_its_key_set_and_later_talks_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with providing() as provider:
        # So long a pause that no caller's question leads to a fetch: the regular ones find out.
        gate = gate_of(tmp_path, rule_of(provider, refresh_s=1, min_pause_s=3600))
        first, second = token(iss=provider.issuer), token(FORGER, iss=provider.issuer, headers={"kid": "k2"})
        async with running(gate):
            assert await principal(gate, first) == "jwt:corp:alice"
            with pytest.raises(CredentialRefused, match="does not publish"):
                await principal(gate, second)
            provider.publish("/moved/keys", public_jwk(FORGER, "k2"))
            # What the first key proved is forgotten, as the new key is known.
            await until(lambda: gate.known(bearer_call(first)) is None)
            assert await principal(gate, second) == "jwt:corp:alice"
            with pytest.raises(CredentialRefused, match="does not publish"):
                await principal(gate, first)
            # Another's document in its place: what is known holds, and the keys of the other are not even asked for.
            provider.answers["/others"] = Answer(json.dumps({"keys": [public_jwk()]}).encode())
            provider.describe(issuer="https://idp.example.com/", jwks_uri=f"{provider.origin}/others")
            await until(lambda: "its issuer is 'https://idp.example.com/', not" in caplog.text)
            assert await principal(gate, token(FORGER, sub="bob", iss=provider.issuer, headers={"kid": "k2"})) == "jwt:corp:bob"
            with pytest.raises(CredentialRefused, match="does not publish"):
                await principal(gate, first)
            assert provider.num_asked["/others"] == 0
            # It comes to its senses.
            provider.publish("/keys", public_jwk())
            await until(lambda: gate.known(bearer_call(second)) is None)
            assert await principal(gate, first) == "jwt:corp:alice"


async def test_a_new_key_at_a_new_place_is_found_when_a_token_names_it(tmp_path: Path) -> None:
    async with providing() as provider:
        gate = gate_of(tmp_path, rule_of(provider))
        assert await principal(gate, token(iss=provider.issuer)) == "jwt:corp:alice"
        provider.publish("/moved", public_jwk(FORGER, "k2"))
        async with asyncio.timeout(30):
            while True:
                try:
                    found = await principal(gate, token(FORGER, iss=provider.issuer, headers={"kid": "k2"}))
                    break
                except CredentialRefused:
                    await asyncio.sleep(0.02)
        assert found == "jwt:corp:alice"
        assert provider.num_asked["/keys"] == 1, "the old place is not asked again"


async def test_a_provider_may_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    provider = Provider()
    try:
        gate = gate_of(tmp_path, rule_of(provider, refresh_s=1, min_pause_s=3600))
        async with running(gate):
            await until(lambda: "the keys of issuer corp could not be fetched: ClientConnectorError" in caplog.text)
            with pytest.raises(Unavailable):
                await principal(gate, token(iss=provider.issuer))
            await provider.start()
            await until(lambda: bool(gate._policy.key_sets[provider.issuer].keys))
            assert await principal(gate, token(iss=provider.issuer)) == "jwt:corp:alice"
    finally:
        await provider.stop()


async def test_a_provider_that_signs_otherwise_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with providing() as provider:
        known = KeySet(IssuerRule(**rule_of(provider, algorithms=["RS512", "ES512"])), tmp_path / "access.yaml", lambda: None)

        async def fetch(**more: Any) -> int:
            provider.describe(**more)
            assert await known._fetch()
            return caplog.text.count("none of which is among the algorithms of the access file: RS512, ES512")

        name = "id_token_signing_alg_values_supported"
        # It may say nothing, or nonsense: then nothing is known.
        for nothing in (None, "RS256", [], [7], ["RS256", "RS512"]):
            assert await fetch(**{name: nothing}) == 0
        assert await fetch(**{name: ["RS256", "EdDSA"]}) == 1
        assert "says that it signs with EdDSA, RS256, none of which" in caplog.text
        assert await fetch(**{name: ["RS256", "EdDSA"]}) == 1, "said once"
        # The next version of the access file knows what was said under this one.
        after = KeySet(known.rule, tmp_path / "access.yaml", lambda: None, known)
        assert await after._fetch()
        assert caplog.text.count("none of which") == 1
        assert after.keys
