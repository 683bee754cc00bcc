"""The access file: who may do what. YAML, read whole, and refused whole with all that is wrong in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from tensorway.access.permissions import Grants, Permission, is_action, parse_permission

#: What a JSON Web Token may be signed with: private keys, which the gateway does not have. A secret that is shared needs `secret_file`.
ASYMMETRIC: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
SHARED: Final = ("HS256", "HS384", "HS512")
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
#: What readers of URLs disagree about is no URL here: white space, which some take out, and the backslash, which some take for a slash.
_URL: Final = re.compile(r"https?://[^\s\\]+", re.IGNORECASE)
#: Where an issuer describes itself (OpenID Connect Discovery 1.0, section 4).
_DISCOVERY_PATH: Final = "/.well-known/openid-configuration"

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _listed(value: object) -> object:
    """One text for a list of one."""
    return [value] if isinstance(value, str) else value


def _allowed(value: str) -> str:
    """A permission, or what can be a role's name; whether there is such a role is checked against the whole file."""
    if ":" in value or is_action(value):
        parse_permission(value)
    elif not value:
        raise ValueError("is empty; write a role or a permission such as infer:minilm")
    return value


def _permission(value: str) -> str:
    parse_permission(value)
    return value


Allow = Annotated[list[Annotated[str, AfterValidator(_allowed)]], BeforeValidator(_listed)]


class _Part(BaseModel):
    # Values are never shown: somebody may have written a key where its hash belongs.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class QuotaRule(_Part):
    """The most that one caller may use of one gateway. None: no limit."""

    requests_per_s: float | None = Field(None, gt=0, le=1e9)
    #: Requests at once after a pause; None: those of one second, at least 1.
    burst: float | None = Field(None, ge=1, le=1e9)
    #: Generated tokens.
    tokens_per_s: float | None = Field(None, gt=0, le=1e9)
    max_in_flight: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _burst_has_rate(self) -> QuotaRule:
        if self.burst is not None and self.requests_per_s is None:
            raise ValueError("burst needs requests_per_s beside it")
        return self


class KeyHash(_Part):
    """One key, as its hash."""

    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    #: Good until then; None: as long as its name is.
    not_after: AwareDatetime | None = None


def _key_hash(value: object) -> object:
    return {"hash": value} if isinstance(value, str) else value


class KeyRule(_Part):
    """A caller with an API key; with two of them while one takes over from the other."""

    name: Name
    hashes: list[Annotated[KeyHash, BeforeValidator(_key_hash)]] = Field(min_length=1, max_length=2)
    allow: Allow = []
    not_after: AwareDatetime | None = None
    quota: str = ""


class IssuerRule(_Part):
    """Callers with a JSON Web Token (RFC 7519) of one issuer."""

    #: Stands in principals and logs.
    name: Name
    #: The claim `iss`, to the letter. With neither `jwks` nor `secret_file` it is an https URL (http on this machine), and the keys are
    #: those of the key set that the issuer itself names there (OpenID Connect Discovery 1.0).
    issuer: str = Field(min_length=1, max_length=512)
    audience: Annotated[list[str], BeforeValidator(_listed)] = Field(min_length=1)
    #: A JSON Web Key Set (RFC 7517): a file, or an https URL. "" means a secret, or the issuer's own word.
    jwks: str = ""
    #: Authorities that vouch for the servers of the issuer and of its key set, PEM; "" means the system's.
    ca_file: str = ""
    #: The key set of a URL is fetched this often, after asking the issuer where it is if `jwks` does not say; and for a key that is not in
    #: it at most every `min_pause_s`.
    refresh_s: float = Field(3600.0, ge=1, le=7 * 86400)
    min_pause_s: float = Field(30.0, ge=0.1, le=3600)
    #: A secret that is shared with the issuer, at least 32 bytes; only with the HS algorithms.
    secret_file: str = ""
    algorithms: list[Literal[ASYMMETRIC + SHARED]] = Field(["RS256", "ES256"], min_length=1)  # type: ignore[valid-type]
    principal_claim: str = Field("sub", min_length=1)
    scope_claim: str = Field("scope", min_length=1)
    #: Scope -> what it allows. A scope that is not here allows nothing.
    scopes: Mapping[str, Allow] = {}
    #: What every token of this issuer allows.
    allow: Allow = []
    leeway_s: float = Field(30.0, ge=0, le=300)
    quota: str = ""

    @property
    def discovery_url(self) -> str:
        """Where the issuer says where its keys are (OpenID Connect Discovery 1.0, section 4); "" where this rule says it."""
        return "" if self.jwks or self.secret_file else self.issuer.removesuffix("/") + _DISCOVERY_PATH

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> IssuerRule:
        if self.jwks and self.secret_file:
            raise ValueError("give either jwks or secret_file, not both")
        if self.discovery_url and not (is_safe_url(self.issuer) and not set(self.issuer) & set("?#@")):
            raise ValueError(
                "give jwks, or secret_file, or an issuer whose keys can be discovered: an https URL (http only on this machine) without "
                "user, query or fragment"
            )
        is_shared = {algorithm in SHARED for algorithm in self.algorithms}
        if is_shared != {bool(self.secret_file)}:
            raise ValueError(
                "algorithms: HS256, HS384 and HS512 go with secret_file and with nothing else; whoever can check such a token can forge it"
            )
        if "://" in self.jwks and not is_safe_url(self.jwks):
            raise ValueError("jwks: the URL must be https, or http on this machine")
        return self


class CertificateRule(_Part):
    """A caller known by its TLS client certificate."""

    #: A subject alternative name: a DNS name or a URI such as spiffe://mesh/batch, to the letter.
    name: str = Field(min_length=1, max_length=512)
    allow: Allow = []
    quota: str = ""


class AnonymousRule(_Part):
    """Callers that show nothing; all of them share one quota."""

    allow: Allow = []
    quota: str = ""


class AccessFile(_Part):
    """The whole file."""

    roles: Mapping[Name, list[Annotated[str, AfterValidator(_permission)]]] = {}
    quotas: Mapping[Name, QuotaRule] = {}
    keys: list[KeyRule] = []
    issuers: list[IssuerRule] = []
    certificates: list[CertificateRule] = []
    anonymous: AnonymousRule = AnonymousRule()

    def grants(self, allow: list[str]) -> Grants:
        """What a list of roles and permissions allows."""
        permissions: list[Permission] = []
        for item in allow:
            permissions += map(parse_permission, self.roles.get(item, [item]))
        return Grants(permissions)

    def quota(self, name: str) -> QuotaRule:
        """The quota of that name; no limits for ""."""
        return self.quotas[name] if name else QuotaRule()


def is_safe_url(url: str) -> bool:
    """Whether nobody on the way can exchange what is read there: https, or http on this machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return _URL.fullmatch(url) is not None and bool(parts.hostname) and (parts.scheme == "https" or parts.hostname in _LOOPBACK)


def beside(path: Path, name: str) -> Path:
    """A file that the access file at `path` names: relative to it."""
    return path.parent / os.path.expanduser(name)
