"""Placement and topology: every node computes the same assignment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tensorway_worker.placement import Desired, Replica, replica_to_move, replicas_to_claim, replicas_to_stop
from tensorway_worker.topology import Topology, assign_devices, threads_per_rank

OFFERS = {"n1": frozenset({"r1", "r2"}), "n2": frozenset({"r1", "r2"})}


def test_two_nodes_split_two_replicas() -> None:
    desired = {"a": Desired("r1", 2)}
    mine = {node: replicas_to_claim(desired, {}, OFFERS, node, may_double=False) for node in OFFERS}
    assert sorted(replica.index for replicas in mine.values() for replica in replicas) == [0, 1]
    assert all(len(replicas) == 1 for replicas in mine.values())


def test_a_lone_node_takes_a_second_replica_only_once_it_may() -> None:
    desired = {"a": Desired("r1", 2)}
    offers = {"n1": OFFERS["n1"]}
    assert len(replicas_to_claim(desired, {}, offers, "n1", may_double=False)) == 1
    assert len(replicas_to_claim(desired, {}, offers, "n1", may_double=True)) == 2


def test_a_dead_nodes_claim_falls_to_the_other() -> None:
    desired = {"a": Desired("r1", 1)}
    assert replicas_to_claim(desired, {"a/r1/0": "n1"}, OFFERS, "n2", may_double=True) == ()
    assert replicas_to_claim(desired, {}, {"n2": OFFERS["n2"]}, "n2", may_double=True) == (Replica("a", "r1", 0),)


def test_what_a_returned_node_lacks_moves_to_it_and_no_more() -> None:
    both_here = {"a/r1/0": "n1", "a/r1/1": "n1", "b/r2/0": "n1"}
    assert replica_to_move(both_here, OFFERS, "n1") == "a/r1/1"
    assert replica_to_move(both_here, OFFERS, "n2") is None
    assert replica_to_move(both_here, {"n1": OFFERS["n1"]}, "n1") is None
    assert replica_to_move(both_here, {**OFFERS, "n2": frozenset({"r2"})}, "n1") is None
    # Three on two nodes are as even as they can be.
    assert replica_to_move({"a/r1/0": "n1", "a/r1/1": "n1", "a/r1/2": "n2"}, OFFERS, "n1") is None


def test_a_node_without_the_files_claims_nothing() -> None:
    assert replicas_to_claim({"a": Desired("other", 1)}, {}, OFFERS, "n1", may_double=True) == ()


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.sampled_from(["r1", "r2"]), st.integers(0, 4)), max_size=6),
    st.sets(st.sampled_from(["n1", "n2", "n3"]), min_size=1),
)
def test_the_nodes_together_claim_every_replica_exactly_once(wishes: dict[str, tuple[str, int]], nodes: set[str]) -> None:
    desired = {model: Desired(revision, count) for model, (revision, count) in wishes.items()}
    offers = {node: frozenset({"r1", "r2"}) for node in nodes}
    claimed = [replica for node in nodes for replica in replicas_to_claim(desired, {}, offers, node, may_double=True)]
    assert len(claimed) == len(set(claimed)) == sum(wish.num_replicas for wish in desired.values())


def test_an_old_revision_goes_on_until_the_new_one_lives() -> None:
    old = Replica("a", "r1", 0)
    desired = {"a": Desired("r2", 1)}
    assert replicas_to_stop((old,), desired, frozenset({"r1"})) == ()
    assert replicas_to_stop((old,), desired, frozenset({"r1", "r2"})) == (old,)
    assert replicas_to_stop((old,), {}, frozenset()) == (old,)
    assert replicas_to_stop((Replica("a", "r2", 1),), desired, frozenset()) == (Replica("a", "r2", 1),)


def test_devices_go_round_robin_and_the_least_used_first() -> None:
    assert assign_devices(("cuda:0", "cuda:1"), 3, ()) == ("cuda:0", "cuda:1", "cuda:0")
    assert assign_devices(("cuda:0", "cuda:1"), 1, ("cuda:0",)) == ("cuda:1",)
    assert assign_devices((), 2, ()) == ("cpu", "cpu")


def test_world_size_and_threads() -> None:
    assert Topology(2, 3).world_size == 6
    assert threads_per_rank(8, 2, 0) == 4
    assert threads_per_rank(1, 4, 0) == 1
    assert threads_per_rank(8, 2, 3) == 3
