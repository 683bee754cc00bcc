"""Who calls: a principal, what it may do, and how much."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Final

from tensorway.access.permissions import WILDCARD, Action, Grants, Permission
from tensorway.access.schema import QuotaRule
from tensorway.errors import PermissionDenied, TensorwayError, Unauthenticated
from tensorway_gateway.identity.quota import Meter

ANONYMOUS: Final = "anonymous"
_TAG_BYTES: Final = 16
_NUM_SHOWN: Final = 5
_STREAM_ID_BYTES: Final = 16


class Caller:
    """A principal that is known, with its permissions and its meter. Shared by all its requests."""

    __slots__ = ("grants", "meter", "principal", "tag")

    def __init__(self, principal: str, grants: Grants, meter: Meter) -> None:
        #: `key:NAME`, `jwt:ISSUER:SUBJECT`, `certificate:NAME` or `anonymous`.
        self.principal: Final = principal
        self.grants: Final = grants
        self.meter: Final = meter
        #: Stands for the principal in what another must not be able to name. 128 bits of its hash; no secret.
        self.tag: Final = hashlib.blake2b(principal.encode(), digest_size=_TAG_BYTES).hexdigest()

    def permit(self, action: Action, model: str) -> None:
        """Raises PermissionDenied (Unauthenticated for a caller without a name) where the action is not allowed on the model. Says the
        same whether or not there is such a model, so that nobody learns of models by asking."""
        if not self.grants.allows(action, model):
            raise self.refusal(action, f"model {model[:128]!r}" if model else "a model without a name", "")

    def permit_everywhere(self, action: Action) -> None:
        """Raises like `permit` where the action is not allowed on every model."""
        if not self.grants.allows_everywhere(action):
            raise self.refusal(action, "the mesh as a whole", f"; that takes the permission {action.value}:*")

    def permit_sight(self, model: str) -> None:
        """Raises like `permit` where no action at all is allowed on the model."""
        if not self.grants.sees(model):
            raise self.refusal(None, f"model {model[:128]!r}", "")

    def refusal(self, action: Action | None, what: str, hint: str) -> TensorwayError:
        """The error for an action on something that is not allowed."""
        verb = "know of" if action is None else action.value
        if self.principal == ANONYMOUS:
            return Unauthenticated(
                f"callers without credentials may not {verb} {what}; send the metadata `authorization: Bearer KEY-OR-TOKEN` or "
                "`x-api-key: KEY`"
            )
        allowed = [str(permission) for permission in self.grants.permissions]
        said = ", ".join(allowed[:_NUM_SHOWN]) + (" and more" if len(allowed) > _NUM_SHOWN else "")
        return PermissionDenied(f"{self.principal} may not {verb} {what}{hint}; it may: {said or 'nothing'}")

    def sees(self, model: str) -> bool:
        """Whether the model may be named to this caller."""
        return self.grants.sees(model)

    def enter(self) -> None:
        """A request begins. Raises QuotaExceeded; otherwise `leave` follows."""
        self.meter.enter(time.monotonic())

    def leave(self, took_s: float) -> None:
        """A request has ended."""
        self.meter.leave(took_s)

    def scoped(self, key: str) -> str:
        """An idempotency key that no other principal can write, whatever its own key is; "" stays ""."""
        if not key:
            return ""
        # What is sent has a most length too; a hash of a long key is as good as the key.
        short = key if len(key) <= 128 else hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
        return f"{short}@{self.tag}"

    def new_stream_id(self) -> str:
        """An id that nobody can guess, and that says whose the stream is."""
        random = secrets.token_urlsafe(_STREAM_ID_BYTES)
        return f"{random}.{self._stream_tag(random)}"

    def owns_stream(self, stream_id: str) -> bool:
        """Whether `new_stream_id` of this principal, at this gateway or another, drew that id. Who knows another's id cannot make it their
        own: the orchestrator knows the stream by the whole of it."""
        random, _, tag = stream_id.partition(".")
        return hmac.compare_digest(tag.encode(), self._stream_tag(random).encode())

    def _stream_tag(self, random: str) -> str:
        return hashlib.blake2b(f"{random}\0{self.principal}".encode(), digest_size=_TAG_BYTES).hexdigest()


class _Everybody(Caller):
    """Where no access file is: anything goes, nothing is counted, and keys and streams are not told apart."""

    __slots__ = ()

    def permit(self, action: Action, model: str) -> None:
        """Always."""

    def permit_everywhere(self, action: Action) -> None:
        """Always."""

    def permit_sight(self, model: str) -> None:
        """Always."""

    def sees(self, model: str) -> bool:
        return True

    def enter(self) -> None:
        """Not counted."""

    def leave(self, took_s: float) -> None:
        """Not counted."""

    def scoped(self, key: str) -> str:
        return key

    def new_stream_id(self) -> str:
        """None: the orchestrator draws one."""
        return ""

    def owns_stream(self, stream_id: str) -> bool:
        return True


EVERYBODY: Final[Caller] = _Everybody(
    "", Grants([Permission(action, WILDCARD) for action in Action]), Meter("", QuotaRule(max_in_flight=None))
)
