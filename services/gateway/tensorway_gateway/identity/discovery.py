"""What an issuer says of itself (OpenID Connect Discovery 1.0, sections 3 and 4)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from tensorway.access.schema import IssuerRule, is_safe_url
from tensorway.errors import FailedPrecondition

_MAX_URL_CHARS: Final = 2048
_MAX_SHOWN_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Provider:
    """What the document says that matters here."""

    #: Where its key set is.
    jwks_uri: str
    #: What it signs identity tokens with; empty where it does not say.
    algorithms: frozenset[str]

    def signs_for(self, rule: IssuerRule) -> bool:
        """Whether it signs with an algorithm that the rule allows, as far as it says. It speaks of identity tokens; it may sign access
        tokens otherwise."""
        return not self.algorithms or not self.algorithms.isdisjoint(rule.algorithms)


def parse_provider(document: bytes, rule: IssuerRule) -> Provider:
    """Reads the document that was found at the rule's `discovery_url`. Raises FailedPrecondition where it is not this issuer's to the
    letter (section 4.3), or names no key set that can be fetched safely."""
    where = rule.discovery_url
    try:
        said = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise FailedPrecondition(f"{where}: is no JSON ({type(error).__name__})", field="issuer") from None
    if not isinstance(said, dict):
        raise FailedPrecondition(f"{where}: is no JSON object", field="issuer")
    issuer, jwks_uri = said.get("issuer"), said.get("jwks_uri")
    if issuer != rule.issuer:
        named = f"{issuer!r:.{_MAX_SHOWN_CHARS}}" if isinstance(issuer, str) else "no text"
        raise FailedPrecondition(
            f"{where}: its issuer is {named}, not {rule.issuer!r}; write it in the access file to the letter, as it also stands in tokens",
            field="issuer",
        )
    if not isinstance(jwks_uri, str) or len(jwks_uri) > _MAX_URL_CHARS or not is_safe_url(jwks_uri):
        raise FailedPrecondition(
            f"{where}: its jwks_uri must be an https URL, or http on this machine, of at most {_MAX_URL_CHARS} characters", field="issuer"
        )
    listed = said.get("id_token_signing_alg_values_supported")
    return Provider(jwks_uri, frozenset(item for item in listed if isinstance(item, str)) if isinstance(listed, list) else frozenset())
