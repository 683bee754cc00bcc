"""What an issuer publishes by URL, in bounded time and size."""

from __future__ import annotations

import ssl
from typing import Final
from urllib.parse import urlsplit

import aiohttp

#: For one document.
TIMEOUT_S: Final = 5.0
MAX_BYTES: Final = 1024 * 1024
_REDIRECTIONS: Final = range(300, 400)


def shown(url: str) -> str:
    """The URL for logs and errors: without the user and password that may stand in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


async def download(session: aiohttp.ClientSession, url: str, tls: ssl.SSLContext | bool) -> bytes:
    """The document at `url`; redirects are not followed, because they lead to where nobody said the keys are. Raises ValueError for another
    answer than 200 or more than MAX_BYTES, TimeoutError after TIMEOUT_S, and aiohttp.ClientError or OSError where there is no answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with session.get(url, ssl=tls, allow_redirects=False, timeout=timeout) as response:
            if response.status != 200:
                more = "; redirects are not followed" if response.status in _REDIRECTIONS else ""
                raise ValueError(f"{shown(url)} answered {response.status}{more}")
            document = bytearray()
            async for part in response.content.iter_chunked(65536):
                document += part
                if len(document) > MAX_BYTES:
                    raise ValueError(f"{shown(url)} is longer than {MAX_BYTES} bytes")
            return bytes(document)
    except TimeoutError:
        raise TimeoutError(f"{shown(url)} did not answer within {TIMEOUT_S:g} s") from None
