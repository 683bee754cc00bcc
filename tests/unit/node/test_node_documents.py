"""What nodes read in each other's documents."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest

from tensorway_worker.node_documents import NodeDocument, ranks_by_host, read_node_documents


def written(*revisions: str, ranks: tuple[str, ...] = ()) -> bytes:
    return json.dumps({"node": "n", "revisions": revisions, "groups": [{"id": "g", "ranks": [{"node": node} for node in ranks]}]}).encode()


def test_offers_and_ranks_are_read() -> None:
    found = read_node_documents({"nodes/a": written("r1", "r2", ranks=("a", "b", "b")), "nodes/b": b"{}"})
    assert found == {"a": NodeDocument(frozenset({"r1", "r2"}), Counter(a=1, b=2)), "b": NodeDocument(frozenset())}


NO_DOCUMENTS = (b"", b"{", b"[]", b"7", b"\xff", b'{"groups": [{"ranks": [{}]}]}', b'{"groups": 1}', b'{"revisions": 1}')


@pytest.mark.parametrize("document", NO_DOCUMENTS)
def test_what_is_no_document_is_left_out(document: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert set(read_node_documents({"nodes/a": document, "nodes/b": written("r1")})) == {"b"}
    assert "nodes/a is no node's" in caplog.text


def test_the_ranks_of_a_dead_owner_do_not_weigh_on_its_guests() -> None:
    found = read_node_documents({"nodes/a": written(ranks=("a", "b")), "nodes/dead": written(ranks=("dead", "b", "b"))})
    assert ranks_by_host(found, {"a", "b"}) == Counter(a=1, b=1)
    assert ranks_by_host({}, ()) == Counter()
