"""Revision specs as documents of the registry: JSON in, JSON out."""

from __future__ import annotations

from pydantic import TypeAdapter

from tensorway.registry.port import REVISIONS
from tensorway.signature import RevisionSpec

_ADAPTER: TypeAdapter[RevisionSpec] = TypeAdapter(RevisionSpec)


def revision_key(model: str, revision: str) -> str:
    """Key of a revision's document."""
    return f"{REVISIONS}{model}/{revision}"


def encode_revision(spec: RevisionSpec) -> bytes:
    """The document of a revision."""
    return _ADAPTER.dump_json(spec)


def decode_revision(document: bytes) -> RevisionSpec:
    """Raises pydantic.ValidationError where the document is not a revision spec."""
    return _ADAPTER.validate_json(document)
