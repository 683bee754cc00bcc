"""What a node that starts wants of a model that it offers. Pure."""

from __future__ import annotations

import json
from typing import Any

from tensorway.signature import RevisionSpec


def first_wish(spec: RevisionSpec, document: bytes | None) -> dict[str, Any]:
    """The document `desired/MODEL` that a node should write at its start.

    A number that the mesh or a person has chosen meanwhile stays: a node that starts is no reason to change it. Another revision of a model
    that scales begins with at least as many replicas as serve now, so that it can take over what they do.

    Args:
        document: the present one, None where there is none.
    """
    wish: dict[str, Any] = {"model": spec.model, "revision": spec.revision, "replicas": spec.num_replicas}
    present = _present(document)
    if present is None:
        return wish
    revision, num_replicas, is_by_hand = present
    is_same = revision == spec.revision
    if spec.scaling is not None:
        kept = max(spec.scaling.min_replicas, min(spec.scaling.max_replicas, num_replicas))
        return wish | {"replicas": kept if is_same else max(spec.num_replicas, kept)}
    return wish | {"replicas": num_replicas, "by_hand": True} if is_same and is_by_hand else wish


def _present(document: bytes | None) -> tuple[str, int, bool] | None:
    """(revision, replicas, whether a person chose them); None where the document is no desired state, which is then replaced."""
    if document is None:
        return None
    try:
        found = json.loads(document)
        return str(found["revision"]), int(found["replicas"]), bool(found.get("by_hand", False))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
