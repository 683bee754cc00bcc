"""Which replicas this node should claim. Pure.

Every node computes the same assignment of the unclaimed replicas from the same facts, so that each claims only its own and the claim itself
merely settles races. Loads are balanced first; equal loads are split by rendezvous hashing (Thaler and Ravishankar, 1998).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Desired:
    """What should run of one model."""

    revision: str
    num_replicas: int


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica of a revision; its claim's key is `key`."""

    model: str
    revision: str
    index: int

    @property
    def key(self) -> str:
        return f"{self.model}/{self.revision}/{self.index}"


@dataclass(frozen=True, slots=True)
class Partner:
    """A node that may host ranks of a group that another node owns."""

    node: str
    #: Of its NodeService.
    endpoint: str


def partners_for(
    replica: Replica, owner: str, offers: Mapping[str, frozenset[str]], endpoints: Mapping[str, str], num_ranks: Mapping[str, int]
) -> tuple[Partner, ...]:
    """The live nodes besides `owner` that offer the replica's revision: those with the fewest ranks first, equals by rendezvous hashing.

    Args:
        endpoints: live nodes' own, by node.
        num_ranks: ranks that each node runs now, for itself and for others.
    """
    able = [node for node in endpoints if node != owner and replica.revision in offers.get(node, frozenset())]
    able.sort(key=lambda node: (num_ranks.get(node, 0), _hash(replica.key, node)))
    return tuple(Partner(node, endpoints[node]) for node in able)


def wanted_replicas(desired: Mapping[str, Desired]) -> tuple[Replica, ...]:
    """Every replica that should exist, first replicas of all models before second ones."""
    replicas = [
        Replica(model, wish.revision, index) for model, wish in sorted(desired.items()) for index in range(wish.num_replicas)
    ]
    return tuple(sorted(replicas, key=lambda replica: (replica.index, replica.model)))


def replicas_to_claim(
    desired: Mapping[str, Desired],
    claims: Mapping[str, str],
    offers: Mapping[str, frozenset[str]],
    node: str,
    may_double: bool,
) -> tuple[Replica, ...]:
    """The unclaimed replicas that fall to `node`.

    `claims` maps claim keys to the nodes that hold them, `offers` live nodes to the revisions they have. While `may_double` is false a
    node takes no second replica of a revision: another node may be about to join.
    """
    load = Counter(claims.values())
    held = Counter((holder, key.rpartition("/")[0]) for key, holder in claims.items())
    mine: list[Replica] = []
    for replica in wanted_replicas(desired):
        candidates = [name for name, revisions in offers.items() if replica.revision in revisions]
        if replica.key in claims or not candidates:
            continue
        family = f"{replica.model}/{replica.revision}"
        chosen = min(candidates, key=lambda name: (held[name, family], load[name], _hash(replica.key, name)))
        if chosen == node and (may_double or not held[chosen, family]):
            mine.append(replica)
        load[chosen] += 1
        held[chosen, family] += 1
    return tuple(mine)


def replica_to_move(claims: Mapping[str, str], offers: Mapping[str, frozenset[str]], node: str) -> str | None:
    """The claim that `node` should give up, because it runs two replicas more of a revision than another live node that has the revision:
    which then takes it. None where all is even. Without this, what a lost node's neighbours took over would stay there for ever."""
    held: dict[str, Counter[str]] = {}
    for key, holder in claims.items():
        held.setdefault(key.rpartition("/")[0], Counter())[holder] += 1
    for family, counts in sorted(held.items()):
        revision = family.rpartition("/")[2]
        fewest = min((counts[name] for name, revisions in offers.items() if name != node and revision in revisions), default=None)
        if fewest is not None and counts[node] >= fewest + 2:
            return max(key for key, holder in claims.items() if holder == node and key.rpartition("/")[0] == family)
    return None


def replicas_to_stop(running: tuple[Replica, ...], desired: Mapping[str, Desired], live_revisions: frozenset[str]) -> tuple[Replica, ...]:
    """The running replicas that are no longer wanted. An old revision goes on until the new one lives somewhere."""
    stop: list[Replica] = []
    for replica in running:
        wish = desired.get(replica.model)
        if wish is None:
            stop.append(replica)
            continue
        is_surplus = wish.revision == replica.revision and replica.index >= wish.num_replicas
        is_replaced = wish.revision != replica.revision and (wish.revision in live_revisions or not wish.num_replicas)
        if is_surplus or is_replaced:
            stop.append(replica)
    return tuple(stop)


def _hash(key: str, node: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{node}".encode(), digest_size=8).digest()
