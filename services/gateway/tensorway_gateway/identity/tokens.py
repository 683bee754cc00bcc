"""JSON Web Tokens (RFC 7519, with the advice of RFC 8725): which issuer's, whether it is genuine, and for whom.

What the token says of itself decides nothing but which of the configured issuers is asked: its algorithm must be one that the access file
allows for that issuer, and the key must be of that algorithm's kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jwt
from jwt.utils import base64url_decode

from tensorway.access.schema import IssuerRule
from tensorway_gateway.identity.key_sets import KeySet
from tensorway_gateway.identity.refusals import CredentialRefused

MAX_TOKEN_CHARS: Final = 16 * 1024
_MAX_SUBJECT_CHARS: Final = 256
_NUM_PARTS: Final = 3


@dataclass(frozen=True, slots=True)
class Claims:
    """What a genuine token says."""

    subject: str
    scopes: frozenset[str]
    #: Not good from then on, seconds since 1970, leeway included.
    until_s: float


def is_token(credential: str) -> bool:
    """Whether it has the form of a signed token."""
    return credential.count(".") == _NUM_PARTS - 1


async def verify_token(token: str, key_sets: Mapping[str, KeySet]) -> tuple[IssuerRule, Claims]:
    """Raises CredentialRefused with one sentence that says what is wrong, or Unavailable where the issuer's keys are not known yet.
    `key_sets` by the claim `iss`."""
    if len(token) > MAX_TOKEN_CHARS:
        raise CredentialRefused(f"the token has {len(token)} characters, more than {MAX_TOKEN_CHARS}", "malformed")
    head, claimed = _peek(token)
    issuer = claimed.get("iss")
    key_set = key_sets.get(issuer) if isinstance(issuer, str) else None
    if key_set is None:
        raise CredentialRefused("the token's issuer (claim iss) is none of those trusted here", "wrong_issuer")
    rule = key_set.rule
    algorithm, kid = head.get("alg"), head.get("kid")
    # "none" and the like are no algorithm of any issuer: the schema knows no such name.
    if not isinstance(algorithm, str) or algorithm not in rule.algorithms:
        allowed = ", ".join(rule.algorithms)
        raise CredentialRefused(f"the token's algorithm is not one of those allowed for its issuer: {allowed}", "wrong_algorithm")
    if "crit" in head:
        raise CredentialRefused("the token's header demands extensions (crit) that are not known here", "malformed")
    if kid is not None and not isinstance(kid, str):
        raise CredentialRefused("the token's key id (kid) is no text", "malformed")
    if key_set.secret:
        return rule, _checked(token, key_set.secret, algorithm, rule)
    key = await key_set.find_anew(kid, algorithm)
    if key is None:
        named = "names no key (kid), and its issuer has several" if kid is None else "is signed with a key that its issuer does not publish"
        raise CredentialRefused(f"the token {named}", "unknown_key")
    return rule, _checked(token, key.key, algorithm, rule)


def _peek(token: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Header and claims, neither of them believed."""
    parts = token.split(".")
    try:
        head, claims = (json.loads(base64url_decode(part)) for part in parts[:2])
    except (ValueError, RecursionError):
        raise CredentialRefused("the token is no JSON Web Token: its header or claims cannot be read", "malformed") from None
    if not isinstance(head, dict) or not isinstance(claims, dict):
        raise CredentialRefused("the token is no JSON Web Token: its header or claims are no objects", "malformed")
    return head, claims


def _checked(token: str, key: Any, algorithm: str, rule: IssuerRule) -> Claims:
    required = ["iss", "aud", "exp", rule.principal_claim]
    try:
        claims = jwt.decode(
            token, key, algorithms=[algorithm], audience=rule.audience, issuer=rule.issuer, leeway=rule.leeway_s,
            options={"require": required},
        )
    except jwt.ExpiredSignatureError:
        raise CredentialRefused("the token has expired; get a new one", "expired") from None
    except jwt.ImmatureSignatureError:
        raise CredentialRefused("the token is not valid yet (claim nbf or iat)", "not_yet") from None
    except jwt.InvalidAudienceError:
        raise CredentialRefused("the token is for another audience (claim aud)", "wrong_audience") from None
    except jwt.MissingRequiredClaimError as error:
        raise CredentialRefused(f"the token lacks the claim {error.claim}", "malformed") from None
    except jwt.InvalidSignatureError:
        raise CredentialRefused("the token's signature is not its issuer's", "forged") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
        # Their texts may hold parts of the token; their names do not.
        raise CredentialRefused(f"the token is not valid ({type(error).__name__})", "malformed") from None
    return Claims(_subject(claims, rule), _scopes(claims.get(rule.scope_claim)), float(claims["exp"]) + rule.leeway_s)


def _subject(claims: Mapping[str, Any], rule: IssuerRule) -> str:
    subject = claims[rule.principal_claim]
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT_CHARS or not subject.isprintable():
        raise CredentialRefused(
            f"the token's claim {rule.principal_claim} is no text of 1 to {_MAX_SUBJECT_CHARS} printable characters", "malformed"
        )
    return subject


def _scopes(claim: object) -> frozenset[str]:
    """A text of words (RFC 8693, section 4.2), or a list of texts, as some issuers write them."""
    if isinstance(claim, str):
        return frozenset(claim.split())
    return frozenset(item for item in claim if isinstance(item, str)) if isinstance(claim, list) else frozenset()
