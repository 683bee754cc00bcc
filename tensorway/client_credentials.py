"""Who a client says it is: an API key, or a token that may change while the client lives."""

from __future__ import annotations

from collections.abc import Callable

from tensorway.errors import InvalidRequest

#: What goes with each attempt.
Credentials = Callable[[], tuple[tuple[str, str], ...]]


def no_credentials() -> tuple[tuple[str, str], ...]:
    """Nobody in particular."""
    return ()


def credentials_of(api_key: str, token: str | Callable[[], str]) -> Credentials:
    """`authorization: Bearer …` with the key, the token, or what `token` returns when it is called, which is for every attempt: it must
    return at once. Raises InvalidRequest where both are given, and the credentials do for what no header can hold."""
    if api_key and token:
        raise InvalidRequest("api_key: give either an API key or a token", field="api_key")
    if callable(token):
        return lambda: _header(token(), "token")
    if not api_key and not token:
        return no_credentials
    header = _header(api_key or token, "api_key" if api_key else "token")
    return lambda: header


def _header(credential: str, field: str) -> tuple[tuple[str, str], ...]:
    # grpc would show what it cannot send in its error.
    if not credential or not credential.isascii() or not credential.isprintable() or " " in credential:
        raise InvalidRequest(f"{field}: must be printable ASCII without spaces; is there a line break at its end?", field=field)
    return (("authorization", f"Bearer {credential}"),)
