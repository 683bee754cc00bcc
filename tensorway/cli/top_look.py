"""Reads the mesh for `tensorway top`: through the gateway, and at the ops ports that members name."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tensorway.cli.connection import Connection
from tensorway.cli.top_frame import Labels, Look, Samples
from tensorway.client import AsyncClient
from tensorway.registry.port import GATEWAY, Registration

_LOG = logging.getLogger(__name__)
#: An ops port that does not answer for so long is left out of this look, seconds.
_OPS_S: Final = 1.5
_CALL_S: Final = 5.0
_WANTED: Final = ("tensorway_", "process_")


@dataclass(slots=True)
class MeshReader:
    """Takes looks. `client` and `session` are the caller's to close."""

    client: AsyncClient
    session: aiohttp.ClientSession
    #: None: ops ports are only asked in the clear.
    tls: ssl.SSLContext | None = None

    async def look(self) -> Look:
        """One look. Raises TensorwayError where the gateway does not answer; members that do not are left out."""
        members, loads = await asyncio.gather(self.client.topology(timeout_s=_CALL_S), self.client.load(timeout_s=_CALL_S))
        asked = [one for one in members if one.metadata.get("ops")]
        at_s, unix_s = time.monotonic(), time.time()
        samples = await asyncio.gather(*(self._samples(one) for one in asked))
        errors = await asyncio.gather(*(self._errors(one) for one in asked if one.kind == GATEWAY))
        found = {one.id: read for one, read in zip(asked, samples, strict=True) if read is not None}
        return Look(at_s, unix_s, members, loads, found, [error for each in errors for error in each])

    async def _samples(self, member: Registration) -> Samples | None:
        text = await self._get(member, "/metrics")
        return None if text is None else read_samples(text)

    async def _errors(self, member: Registration) -> Sequence[Mapping[str, Any]]:
        text = await self._get(member, "/status.json")
        if text is None:
            return ()
        found: Sequence[Mapping[str, Any]] = json.loads(text).get("errors", ())
        return found

    async def _get(self, member: Registration, path: str) -> str | None:
        ops = member.metadata["ops"]
        for scheme in ("https", "http") if self.tls is not None else ("http",):
            try:
                async with asyncio.timeout(_OPS_S), self.session.get(f"{scheme}://{ops}{path}", ssl=self.tls or True) as answer:
                    if answer.status == 200:
                        return await answer.text()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                _LOG.debug("the ops port of %s does not answer: %s", member.id, error)
        return None


def read_samples(text: str) -> Samples:
    """The mesh's and the process's samples of Prometheus' text format."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(_WANTED):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = float(sample.value)
    return found


def ops_tls(given: Connection) -> ssl.SSLContext | None:
    """For ops ports with ops_tls: the same authority and certificate as for the gateway. A member's certificate names its role, not the
    host that it runs on: that it is the authority's is what counts. None where no TLS was asked for."""
    if not (given.ca or given.cert):
        return None
    context = ssl.create_default_context(cafile=given.ca or None)
    context.check_hostname = False
    if given.cert:
        context.load_cert_chain(given.cert, given.key)
    return context
