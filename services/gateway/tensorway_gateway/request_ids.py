"""Ids of requests: the caller's own, or new ones."""

from __future__ import annotations

import itertools
import secrets
from typing import Final
from urllib.parse import quote

from tensorway.errors import InvalidRequest
from tensorway_gateway.requests import MAX_REQUEST_ID_CHARS

REQUEST_ID_TRAILER: Final = "tensorway-request-id"
_PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class RequestIds:
    """Ids for requests that came without one: unique in the mesh, and cheap."""

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def next(self) -> str:
        return f"{self._prefix}-{next(self._numbers):x}"

    def given_or_next(self, given: str) -> str:
        """The caller's id, or a new one. Raises InvalidRequest for one that is too long to carry along."""
        if not given:
            return self.next()
        if len(given) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"request_id: {len(given)} characters are more than {MAX_REQUEST_ID_CHARS}", field="request_id")
        return given


def id_trailer(request_id: str) -> tuple[str, str]:
    """The trailer that tells a request's id. Anything but printable ASCII is percent-encoded."""
    text = request_id
    is_plain = text.isascii() and text.isprintable() and "%" not in text
    return REQUEST_ID_TRAILER, text if is_plain else quote(text, safe=_PRINTABLE)
