"""What a node that starts wants of a model, and what it leaves as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tensorway.registry.directory import DirectoryRegistry
from tensorway.registry.port import DESIRED
from tensorway.resilience import Scaling
from tensorway.signature import Batching, RevisionSpec, Signature
from tensorway_worker.node import _publish
from tensorway_worker.wish import first_wish

SPEC = RevisionSpec("m", "r" * 64, "1", "", "python", Signature((), ()), Batching(), 2, 30.0)
SCALES = replace(SPEC, scaling=Scaling(0, 4))


def document(replicas: int, revision: str = SPEC.revision, **more: object) -> bytes:
    return json.dumps({"model": "m", "revision": revision, "replicas": replicas, **more}).encode()


@pytest.mark.parametrize(
    ("spec", "present", "replicas"),
    [
        (SPEC, None, 2),
        (SPEC, document(5), 2),
        (SPEC, document(5, by_hand=True), 5),
        (SPEC, document(0, by_hand=True), 0),
        (SPEC, document(5, "old", by_hand=True), 2),
        (SPEC, b"no document", 2),
        (SPEC, b"[]", 2),
        (SCALES, None, 2),
        (SCALES, document(4), 4),
        (SCALES, document(0), 0),
        (SCALES, document(9), 4),
        (SCALES, document(0, "old"), 2),
        (SCALES, document(4, "old"), 4),
    ],
)
def test_what_was_chosen_meanwhile_stays(spec: RevisionSpec, present: bytes | None, replicas: int) -> None:
    wish = first_wish(spec, present)
    assert (wish["model"], wish["revision"], wish["replicas"]) == ("m", SPEC.revision, replicas)


def test_a_number_chosen_by_hand_is_still_so_at_the_next_start() -> None:
    wish = first_wish(SPEC, document(5, by_hand=True))
    assert first_wish(SPEC, json.dumps(wish).encode())["replicas"] == 5


class Contested(DirectoryRegistry):
    """Another writes the document once, just before this one replaces it."""

    other: bytes | None = None

    async def replace(self, key: str, before: bytes, value: bytes) -> bool:
        other, self.other = self.other, None
        if other is not None:
            await self.write(key, other)
        return await super().replace(key, before, value)


async def test_what_another_changes_meanwhile_is_looked_at_anew(tmp_path: Path) -> None:
    """Of the first attempt, which found a number that was chosen by hand, nothing stays."""
    async with Contested(tmp_path / "registry") as registry:
        await registry.write(f"{DESIRED}m", document(5, by_hand=True))
        registry.other = document(7, "old")
        await _publish(registry, SimpleNamespace(spec=SPEC))  # type: ignore[arg-type]
        assert json.loads(await registry.read(f"{DESIRED}m") or b"") == {"model": "m", "revision": SPEC.revision, "replicas": 2}
