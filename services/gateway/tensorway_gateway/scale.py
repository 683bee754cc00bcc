"""What a person may want of the number of a model's replicas. Pure."""

from __future__ import annotations

import json
from typing import Any, Final

from tensorway.errors import FailedPrecondition, InvalidRequest
from tensorway.signature import RevisionSpec

#: Nobody means more: every node looks at each.
MAX_REPLICAS: Final = 1024


def check_replicas(spec: RevisionSpec, replicas: int) -> None:
    """Raises InvalidRequest for a number that nobody can mean, and FailedPrecondition for one outside the bounds of a model that scales."""
    if replicas > MAX_REPLICAS:
        raise InvalidRequest(f"replicas: {replicas} is more than {MAX_REPLICAS}", field="replicas")
    rule = spec.scaling
    if rule is not None and not rule.min_replicas <= replicas <= rule.max_replicas:
        raise FailedPrecondition(
            f"replicas: model {spec.model!r} scales between {rule.min_replicas} and {rule.max_replicas}, and {replicas} is outside; give a "
            "number within, or change `scaling` in its model.yaml", field="replicas",
        )


def with_replicas(spec: RevisionSpec, replicas: int, document: bytes | None) -> bytes:
    """The document `desired/MODEL` with another number, which a node that starts then leaves as it is.

    Raises FailedPrecondition where `document`, the present one, wants another revision than `spec`, or is none.
    """
    wish: dict[str, Any] = {} if document is None else json.loads(document)
    if wish.get("revision") != spec.revision:
        raise FailedPrecondition(
            f"model {spec.model!r} is changing its revision at this moment; ask again when the new one serves", field="model"
        )
    return json.dumps(wish | {"replicas": replicas, "by_hand": True}).encode()
