"""What the documents of nodes say that other nodes act on. Pure."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from tensorway.registry.port import NODES

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeDocument:
    """One node's own words."""

    #: Revisions that it offers to run.
    revisions: frozenset[str]
    #: Ranks of the groups that it owns, by the node that hosts them.
    num_ranks: Counter[str] = field(default_factory=Counter)


def read_node_documents(documents: Mapping[str, bytes]) -> dict[str, NodeDocument]:
    """The documents `nodes/NODE` by node; what is none is left out, with a line in the log."""
    found: dict[str, NodeDocument] = {}
    for key, document in documents.items():
        try:
            words = json.loads(document)
            ranks = Counter(str(rank["node"]) for group in words.get("groups", ()) for rank in group.get("ranks", ()))
            found[key.removeprefix(NODES)] = NodeDocument(frozenset(map(str, words.get("revisions", ()))), ranks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.error("document %s is no node's and is ignored: %s: %s", key, type(error).__name__, error)
    return found


def ranks_by_host(documents: Mapping[str, NodeDocument], live: Container[str]) -> Counter[str]:
    """Ranks that each node runs, for itself and for others. Those of owners that have died do not count: they died with them."""
    return sum((document.num_ranks for node, document in documents.items() if node in live), Counter())
