"""What the mesh can run, computed from what the registry holds. Pure: documents and registrations in, models out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tensorway.errors import InvalidRequest, NotFound
from tensorway.registry.port import Registration
from tensorway.signature import RevisionSpec
from tensorway_gateway.signature import SignatureCheck

#: Shortest prefix of a revision that may stand for it.
MIN_PREFIX_CHARS: Final = 8
_BACKING_OFF: Final = "backing_off"
_READY: Final = "ready"
#: Why a model that scales has no replica.
DORMANT: Final = "scaled to zero; starts with the first request"


class ModelState(Enum):
    """The same words as `tensorway.v1.ModelState` and OIP's repository index."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision that can be asked for."""

    spec: RevisionSpec
    check: SignatureCheck
    num_ready_replicas: int
    state: ModelState
    #: Why it is not ready, or lacks replicas; empty where nothing is amiss.
    reason: str
    #: True: no replica is wanted until a request comes, which then waits for one.
    is_dormant: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A model and the revision of it that serves."""

    name: str
    serving: Revision
    num_replicas: int
    #: The serving one first, then every other one with a live group.
    revisions: tuple[Revision, ...]

    def find(self, revision: str, *, is_version: bool = False) -> Revision:
        """The revision meant by a full revision, a unique prefix of one, or (`is_version`) the author's label; the serving one for "".

        Raises NotFound listing what exists, or InvalidRequest where the prefix fits several.
        """
        if not revision:
            return self.serving
        if is_version:
            for candidate in self.revisions:
                if candidate.spec.version == revision:
                    return candidate
        found = [candidate for candidate in self.revisions if candidate.spec.revision.startswith(revision)]
        if len(revision) < MIN_PREFIX_CHARS:
            found = []
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{candidate.spec.revision[:12]} (version {candidate.spec.version})" for candidate in self.revisions)
        if found:
            raise InvalidRequest(f"revision: {revision!r} fits several revisions of model {self.name!r}: {known}", field="revision")
        raise NotFound(f"model {self.name!r} has no revision {revision[:64]!r} that serves; there are: {known}", field="revision")


@dataclass(frozen=True, slots=True)
class Desired:
    """What somebody wants to serve."""

    model: str
    revision: str
    num_replicas: int


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What a node says of one of its groups."""

    model: str
    revision: str
    state: str
    #: Why its last epoch ended; empty while it serves.
    reason: str
    #: What it does now, e.g. which rank loads what.
    detail: str = ""


def build_models(
    desired: Iterable[Desired],
    revisions: Mapping[tuple[str, str], Revision],
    groups: Iterable[Registration],
    reports: Collection[GroupReport],
) -> dict[str, Model]:
    """Every desired model whose revision is published, by name. `revisions` are as published, their state still to be found."""
    live = Counter((group.metadata.get("model", ""), group.metadata.get("revision", "")) for group in groups)
    models: dict[str, Model] = {}
    for wanted in sorted(desired, key=lambda item: item.model):
        published = revisions.get((wanted.model, wanted.revision))
        if published is None:
            continue
        serving = _judge(published, live[wanted.model, wanted.revision], wanted.num_replicas, reports, is_serving=True)
        others = tuple(
            _judge(revisions[model, revision], count, 0, reports, is_serving=False)
            for (model, revision), count in sorted(live.items())
            if model == wanted.model and revision != wanted.revision and (model, revision) in revisions
        )
        models[wanted.model] = Model(wanted.model, serving, wanted.num_replicas, (serving, *others))
    return models


def _judge(published: Revision, num_ready: int, num_wanted: int, reports: Collection[GroupReport], *, is_serving: bool) -> Revision:
    """The published revision with the state that its groups give it."""
    # One that serves no more, though a group of it still ends, is not what the word is about.
    is_dormant = is_serving and not num_wanted and published.spec.scaling is not None
    own = [report for report in reports if (report.model, report.revision) == (published.spec.model, published.spec.revision)]
    failing = [report.reason for report in own if report.state == _BACKING_OFF]
    forming = [report for report in own if report.state not in (_READY, _BACKING_OFF)]
    if num_ready:
        state, reason = ModelState.READY, _lacking(failing, forming) if num_ready < num_wanted else ""
    elif failing and not is_dormant:
        state, reason = ModelState.UNAVAILABLE, failing[0] or "its group failed and is backing off"
    elif not num_wanted:
        state, reason = ModelState.UNAVAILABLE, DORMANT if is_dormant else "no replica of it is wanted"
    elif own:
        state, reason = ModelState.LOADING, _progress((forming or own)[0])
    else:
        state, reason = ModelState.LOADING, "no node has begun to form a group of it"
    return Revision(published.spec, published.check, num_ready, state, reason, is_dormant and not num_ready)


def _lacking(failing: list[str], forming: list[GroupReport]) -> str:
    """Why a model that serves has not all its replicas; empty where nobody has said."""
    if failing:
        return f"a replica fails: {failing[0]}"
    return f"a replica is missing: {_progress(forming[0])}" if forming else ""


def _progress(report: GroupReport) -> str:
    """How far a group is, and what went wrong the last time."""
    now = f"its group is {report.state}" + (f" ({report.detail})" if report.detail else "")
    return f"{now}; before that, {report.reason}" if report.reason else now


def published_revision(spec: RevisionSpec) -> Revision:
    """A revision as its document says, with the check for its signature built once."""
    return Revision(spec, SignatureCheck(spec), 0, ModelState.LOADING, "")
