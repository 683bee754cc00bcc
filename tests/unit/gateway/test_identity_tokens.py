"""Each way a token can be false is refused, by a sentence that holds none of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tensorway.access.schema import IssuerRule
from tensorway.errors import FailedPrecondition, Unavailable
from tensorway_gateway.identity.key_sets import KeySet, parse_key_set
from tensorway_gateway.identity.refusals import CredentialRefused
from tensorway_gateway.identity.tokens import MAX_TOKEN_CHARS, Claims, verify_token
from tests.contract.gateway.identities import FORGER, ISSUER, SIGNER, issuer_rule, public_jwk, token, write_key_set


def key_set(folder: Path, *keys: dict[str, Any], **rule: Any) -> KeySet:
    write_key_set(folder / "jwks.json", *keys)
    return KeySet(IssuerRule(**issuer_rule(**rule)), folder / "access.yaml", lambda: None)


def verify(given: str, known: KeySet) -> Claims:
    return asyncio.run(verify_token(given, {known.rule.issuer: known}))[1]


def unsigned(**more: Any) -> str:
    """A genuine token whose header says that it needs no signature."""
    _, claims, _ = token().split(".")
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "JWT", "kid": "k1"} | more).encode()).rstrip(b"=").decode()
    return f"{head}.{claims}."


def hmac_of_public_key() -> str:
    """Signed with what everybody knows: the issuer's public key, used as a shared secret."""
    pem = SIGNER.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT","kid":"k1"}').rstrip(b"=").decode()
    signed = f"{head}.{token().split('.')[1]}"
    return f"{signed}.{base64.urlsafe_b64encode(hmac.digest(pem, signed.encode(), hashlib.sha256)).rstrip(b'=').decode()}"


def tampered() -> str:
    head, _, signature = token().split(".")
    claims = token(sub="root").split(".")[1]
    return f"{head}.{claims}.{signature}"


FALSE: dict[str, tuple[Callable[[], str], str, str]] = {
    "alg none": (unsigned, "wrong_algorithm", "algorithm"),
    "alg None": (lambda: unsigned(alg="nOnE"), "wrong_algorithm", "algorithm"),
    "forged": (lambda: token(FORGER), "forged", "signature"),
    "tampered": (tampered, "forged", "signature"),
    "no signature": (lambda: token().rpartition(".")[0] + ".", "forged", "signature"),
    "public key as secret": (hmac_of_public_key, "wrong_algorithm", "algorithm"),
    "algorithm of another": (lambda: token(algorithm="RS512"), "wrong_algorithm", "algorithm"),
    "expired": (lambda: token(exp=time.time() - 5), "expired", "expired"),
    "not yet": (lambda: token(nbf=time.time() + 60), "not_yet", "not valid yet"),
    "from the future": (lambda: token(iat=time.time() + 60), "not_yet", "not valid yet"),
    "wrong audience": (lambda: token(aud="another"), "wrong_audience", "audience"),
    "wrong issuer": (lambda: token(iss="https://idp.example.com/evil"), "wrong_issuer", "issuer"),
    "issuer is a list": (lambda: _with_claims(iss=[ISSUER]), "wrong_issuer", "issuer"),
    "no audience": (lambda: token(aud=None), "malformed", "claim aud"),
    "no expiry": (lambda: token(exp=None), "malformed", "claim exp"),
    "no subject": (lambda: token(sub=None), "malformed", "claim sub"),
    "empty subject": (lambda: token(sub=""), "malformed", "claim sub"),
    "subject with line break": (lambda: token(sub="a\nb"), "malformed", "claim sub"),
    "unknown kid": (lambda: token(headers={"kid": "k9"}), "unknown_key", "does not publish"),
    "kid is a number": (lambda: unsigned(alg="RS256", kid=7), "malformed", "kid"),
    "critical extensions": (lambda: unsigned(alg="RS256", crit=["urn:x"]), "malformed", "crit"),
    "huge": (lambda: token(padding="x" * MAX_TOKEN_CHARS), "malformed", "characters"),
    "no base64": (lambda: "a.b.c", "malformed", "cannot be read"),
    "no object": (lambda: "W10.W10.", "malformed", "no objects"),
    "deeply nested": (lambda: base64.urlsafe_b64encode(b"[" * 9000).decode() + ".e30.", "malformed", "cannot be read"),
    "exp is a text": (lambda: _with_claims(exp="soon"), "malformed", "not valid"),
    "exp is infinite": (lambda: _with_claims(exp=float("inf")), "malformed", "not valid"),
}


def _with_claims(**more: Any) -> str:
    """Signed, with claims that the library would not sign."""
    claims = jwt.decode(token(), options={"verify_signature": False}) | more
    return jwt.api_jws.encode(json.dumps(claims).encode(), SIGNER, algorithm="RS256", headers={"kid": "k1"})


@pytest.mark.parametrize("kind", FALSE)
def test_a_false_token_is_refused(tmp_path: Path, kind: str) -> None:
    make, outcome, said = FALSE[kind]
    given = make()
    with pytest.raises(CredentialRefused) as raised:
        verify(given, key_set(tmp_path))
    assert (raised.value.outcome, said in raised.value.message) == (outcome, True), raised.value.message
    assert not [part for part in given.split(".") if len(part) > 8 and part in raised.value.message]


def test_a_genuine_token_says_who_and_what(tmp_path: Path) -> None:
    known = key_set(tmp_path)
    claims = verify(token(scope="a b", exp=4e9), known)
    assert (claims.subject, claims.scopes, claims.until_s) == ("alice", {"a", "b"}, 4e9)
    assert verify(token(scope=["a", 7]), known).scopes == {"a"}
    assert verify(token(scope=None), known).scopes == frozenset()
    assert verify(token(aud=["x", "tensorway"]), known).subject == "alice"
    assert verify(token(exp=time.time() - 5), key_set(tmp_path, leeway_s=60)).subject == "alice"
    assert verify(token(email="a@b"), key_set(tmp_path, principal_claim="email")).subject == "a@b"


def test_a_token_without_kid_needs_the_only_key(tmp_path: Path) -> None:
    bare = token(headers={})
    assert verify(bare, key_set(tmp_path, public_jwk())).subject == "alice"
    with pytest.raises(CredentialRefused, match="names no key"):
        verify(bare, key_set(tmp_path, public_jwk(), public_jwk(FORGER, "k2")))


def test_a_key_is_for_its_own_kind_of_algorithm(tmp_path: Path) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(curve.public_key())) | {"kid": "k1"}
    both = key_set(tmp_path, jwk, algorithms=["RS256", "ES256", "ES384"])
    assert verify(token(curve, "ES256"), both).subject == "alice"
    with pytest.raises(CredentialRefused, match="does not publish"):
        verify(token(), both)
    larger = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(CredentialRefused, match="does not publish"):
        verify(token(larger, "ES384"), both)
    with pytest.raises(CredentialRefused, match="does not publish"):
        verify(token(), key_set(tmp_path, public_jwk(alg="RS512")))


def test_a_shared_secret_is_taken_where_the_file_names_one(tmp_path: Path) -> None:
    secret = b"s" * 32
    (tmp_path / "secret").write_bytes(secret + b"\n")
    known = key_set(tmp_path, jwks="", secret_file="secret", algorithms=["HS256"])
    assert verify(token(secret, "HS256"), known).subject == "alice"
    with pytest.raises(CredentialRefused, match="signature"):
        verify(token(b"t" * 32, "HS256"), known)
    with pytest.raises(CredentialRefused, match="algorithm"):
        verify(token(), known)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(FailedPrecondition, match="fewer than 32 bytes"):
        key_set(tmp_path, jwks="", secret_file="secret", algorithms=["HS256"])


def test_a_key_set_leaves_out_what_must_not_be_trusted(caplog: pytest.LogCaptureFixture) -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    private = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(FORGER)) | {"kid": "private"}
    listed = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"}, public_jwk(weak, "weak"), private, public_jwk(kid="enc", use="enc"), 7, {},
        public_jwk(kid="none", alg="none"), public_jwk(kid="good"),
    ]
    keys = parse_key_set(json.dumps({"keys": listed}).encode(), "here")
    assert [key.kid for key in keys] == ["good"]
    assert "1024 bits" in caplog.text
    assert private["d"] not in caplog.text
    for nothing in (b"", b"[]", b"{}", b'{"keys": []}', b'{"keys": {}}', b"[" * 200_000):
        with pytest.raises(FailedPrecondition):
            parse_key_set(nothing, "here")


class Publisher:
    """An issuer's key set over HTTP."""

    def __init__(self) -> None:
        self.keys = [public_jwk()]
        self.status = 200
        self.num_asked = 0
        self.pause = asyncio.Event()
        self.pause.set()

    async def answer(self, request: web.Request) -> web.Response:
        self.num_asked += 1
        await self.pause.wait()
        return web.json_response({"keys": self.keys}, status=self.status)


async def test_a_key_set_is_fetched_and_fetched_again_for_a_new_key(tmp_path: Path) -> None:
    publisher = Publisher()
    application = web.Application()
    application.router.add_get("/jwks", publisher.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        changes: list[int] = []
        rule = IssuerRule(**issuer_rule(jwks=f"http://{host}:{port}/jwks", min_pause_s=0.1))
        known = KeySet(rule, tmp_path / "access.yaml", lambda: changes.append(1))
        sets = {rule.issuer: known}
        # Nothing is known yet, and the issuer answers with an error: that is not the caller's fault.
        publisher.status = 500
        with pytest.raises(Unavailable):
            await verify_token(token(), sets)
        publisher.status = 200
        while publisher.num_asked < 2:
            try:
                await verify_token(token(), sets)
            except Unavailable:
                await asyncio.sleep(0.02)
        # Many that come at once share one fetch, and an unknown key is asked for no more often than the pause allows.
        publisher.keys = [public_jwk(FORGER, "k2"), public_jwk()]
        await asyncio.sleep(rule.min_pause_s)
        before = publisher.num_asked
        found = await asyncio.gather(*(verify_token(token(FORGER, headers={"kid": "k2"}), sets) for _ in range(20)))
        assert len(found) == 20
        assert publisher.num_asked == before + 1
        assert len(changes) == 2
        for _ in range(5):
            with pytest.raises(CredentialRefused):
                await verify_token(token(headers={"kid": "k3"}), sets)
        assert publisher.num_asked <= before + 2
        # The issuer goes away: what it said last holds.
        await runner.cleanup()
        await asyncio.sleep(rule.min_pause_s)
        with pytest.raises(CredentialRefused):
            await verify_token(token(headers={"kid": "k4"}), sets)
        assert (await verify_token(token(), sets))[1].subject == "alice"
    finally:
        await runner.cleanup()
