"""Why a caller was not believed: for the caller a sentence, for the metric and the audit log a word."""

from __future__ import annotations

from tensorway.errors import Unauthenticated


class CredentialRefused(Unauthenticated):
    """A credential that proves nothing. The sentence never holds any of it; `outcome` is one word of a small set."""

    def __init__(self, message: str, outcome: str) -> None:
        super().__init__(message)
        self.outcome = outcome
