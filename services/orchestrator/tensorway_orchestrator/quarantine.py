"""Requests whose content kills groups. Pure.

After a group has died, everything that it had is sent again, each request alone: what kills a second group is then known for certain, and
all others are answered. It is refused from then on, by its fingerprint, for as long as it is remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import ModelFailed

#: Groups that one request may take with it.
MAX_DEATHS: Final = 2
#: Groups of one node that die within so long of each other died of one cause, and not of what they were sent.
_ONE_CAUSE_S: Final = 0.25
_KEPT_S: Final = 600.0
_MAX_KEPT: Final = 1024


@dataclass(frozen=True, slots=True)
class Death:
    """A group died."""

    node: str
    now_s: float

    def is_one_with(self, before: Death | None) -> bool:
        """Whether the node, not the request, is to blame for both: it was killed, or killed them all."""
        return before is not None and before.node == self.node and self.now_s - before.now_s < _ONE_CAUSE_S


@dataclass(slots=True)
class Quarantine:
    """The fingerprints of one revision's requests that are not run again."""

    _until_s: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def __bool__(self) -> bool:
        """False where nothing needs to be looked up."""
        return bool(self._until_s)

    def add(self, fingerprint: str, now_s: float) -> None:
        """A request has killed too many groups. Seen again, it is remembered anew."""
        self._until_s[fingerprint] = now_s + _KEPT_S
        self._until_s.move_to_end(fingerprint)
        while len(self._until_s) > _MAX_KEPT:
            self._until_s.popitem(last=False)

    def holds(self, fingerprint: str, now_s: float) -> bool:
        """Whether it is refused."""
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
        return fingerprint in self._until_s


def killed(model: str, fingerprint: str, groups: tuple[str, ...]) -> ModelFailed:
    """What the request that killed them is told."""
    return ModelFailed(
        f"groups {' and '.join(groups)} of model {model!r} died with this request, the last of them with it alone; its content "
        f"(fingerprint {fingerprint}) is not run again for {_KEPT_S / 60:.0f} minutes. The groups' logs say why they died"
    )


def refused(model: str, fingerprint: str) -> ModelFailed:
    """What the same content is told later."""
    return ModelFailed(
        f"this content (fingerprint {fingerprint}) has killed {MAX_DEATHS} groups of model {model!r} and is in quarantine; change the "
        "request, or wait until the model is mended"
    )
