"""Requests whose content kills groups. Pure.

After a group has died, everything that it had is sent again, each request alone: what kills a second group is then known for certain, and
all others are answered. It is refused from then on, by its fingerprint, for as long as it is remembered: here, and by every orchestrator
that hears of it (see `shared_quarantine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import ModelFailed

#: Groups that one request may take with it.
MAX_DEATHS: Final = 2
#: How long content is refused, seconds.
KEPT_S: Final = 600.0
#: Fingerprints of one revision that are remembered.
MAX_KEPT: Final = 1024
#: Groups of one node that die within so long of each other died of one cause, and not of what they were sent.
_ONE_CAUSE_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Death:
    """A group died."""

    node: str
    now_s: float

    def is_one_with(self, before: Death | None) -> bool:
        """Whether the node, not the request, is to blame for both: it was killed, or killed them all."""
        return before is not None and before.node == self.node and self.now_s - before.now_s < _ONE_CAUSE_S


@dataclass(frozen=True, slots=True)
class Content:
    """What is in quarantine: one revision does not run what has this fingerprint (see `wire.fingerprint`)."""

    model: str
    revision: str
    fingerprint: str


@dataclass(slots=True)
class Quarantine:
    """The fingerprints of one revision's requests that are not run again, whoever has found them."""

    #: Called with the fingerprint and the groups that died; None: nobody else hears of it.
    on_found: Callable[[str, tuple[str, ...]], None] | None = None
    _until_s: dict[str, float] = field(default_factory=dict)
    #: When the first of them is to be forgotten.
    _next_s: float = math.inf
    #: Those that the registry holds.
    _shown: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        """False where nothing needs to be looked up."""
        return bool(self._until_s)

    def add(self, fingerprint: str, groups: tuple[str, ...], now_s: float) -> None:
        """A request has killed too many groups here. Seen again, it is remembered anew."""
        self._shown.discard(fingerprint)  # a document of it is an older one, which may go
        self._until_s[fingerprint] = now_s + KEPT_S
        self._trim()
        if self.on_found is not None:
            self.on_found(fingerprint, groups)

    def show(self, until_s: Mapping[str, float], now_s: float) -> None:
        """All that the registry holds of this revision, and until when on the clock of `now_s`. What it held before and holds no more is
        lifted; what was found here and is not there yet stays."""
        for fingerprint in self._shown - until_s.keys():
            self._until_s.pop(fingerprint, None)
        live = {fingerprint: end_s for fingerprint, end_s in until_s.items() if end_s > now_s}
        for fingerprint, end_s in live.items():
            self._until_s[fingerprint] = max(end_s, self._until_s.get(fingerprint, end_s))
        self._shown = set(live)
        self._trim()

    def holds(self, fingerprint: str, now_s: float) -> bool:
        """Whether it is refused."""
        if now_s >= self._next_s:
            self._until_s = {each: end_s for each, end_s in self._until_s.items() if end_s > now_s}
            self._trim()
        return fingerprint in self._until_s

    def _trim(self) -> None:
        """Keeps the bound: what would be forgotten first is forgotten now."""
        num_over = len(self._until_s) - MAX_KEPT
        if num_over > 0:
            for fingerprint in sorted(self._until_s, key=self._until_s.__getitem__)[:num_over]:
                del self._until_s[fingerprint]
        self._next_s = min(self._until_s.values(), default=math.inf)


@dataclass(slots=True)
class Quarantines:
    """Of all revisions. One of each for as long as the process lives: its lane, and what others say of it, come in either order."""

    #: Called with what was found here, and the groups that died.
    on_found: Callable[[Content, tuple[str, ...]], None] | None = None
    _of: dict[tuple[str, str], Quarantine] = field(default_factory=dict)

    def of(self, model: str, revision: str) -> Quarantine:
        """That of one revision."""
        found = self._of.get((model, revision))
        if found is None:
            found = self._of[model, revision] = Quarantine(lambda fingerprint, groups: self._found(model, revision, fingerprint, groups))
        return found

    def show(self, contents: Mapping[Content, float], now_s: float) -> None:
        """All that the registry holds, and until when on the clock of `now_s`; see `Quarantine.show`."""
        by_revision: dict[tuple[str, str], dict[str, float]] = {identity: {} for identity in self._of}
        for content, end_s in contents.items():
            by_revision.setdefault((content.model, content.revision), {})[content.fingerprint] = end_s
        for identity, until_s in by_revision.items():
            self.of(*identity).show(until_s, now_s)

    def _found(self, model: str, revision: str, fingerprint: str, groups: tuple[str, ...]) -> None:
        if self.on_found is not None:
            self.on_found(Content(model, revision, fingerprint), groups)


def killed(model: str, fingerprint: str, groups: tuple[str, ...]) -> ModelFailed:
    """What the request that killed them is told."""
    return ModelFailed(
        f"groups {' and '.join(groups)} of model {model!r} died with this request, the last of them with it alone; its content "
        f"(fingerprint {fingerprint}) is not run again for {KEPT_S / 60:.0f} minutes. The groups' logs say why they died"
    )


def refused(model: str, fingerprint: str) -> ModelFailed:
    """What the same content is told later."""
    return ModelFailed(
        f"this content (fingerprint {fingerprint}) has killed {MAX_DEATHS} groups of model {model!r} and is in quarantine; change the "
        "request, or wait until the model is mended"
    )
