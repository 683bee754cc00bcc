"""Which groups of a roster may have batches now, and how many there are of each kind. Pure: every change costs the same."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field

from tensorway_orchestrator.forecast import Forecast
from tensorway_orchestrator.group_record import GroupRecord
from tensorway_orchestrator.routing import Zone
from tensorway_orchestrator.standing import State
from tensorway_orchestrator.urn import Urn


@dataclass(slots=True, eq=False)
class Rotation:
    """Counters and urns of one roster. `place` brings them in line with a group as it is."""

    #: Batches that one group has at once.
    max_in_flight: int
    #: The orchestrator's zone; "" for none.
    zone: str
    forecast: Forecast
    #: All groups of the roster, for their number.
    groups: Sized
    #: Groups whose link is up and which are not leaving, whatever their standing.
    num_live: int = 0
    #: Free places of groups in rotation that do not rest.
    num_free_places: int = 0
    own: Zone = field(default_factory=lambda: Zone(Urn(), Urn()))
    others: Zone = field(default_factory=lambda: Zone(Urn(), Urn()))
    #: Groups that wait for a probe.
    probes: Urn[GroupRecord] = field(default_factory=Urn)
    #: Live groups that are ejected or probing.
    left_out: dict[GroupRecord, None] = field(default_factory=dict)

    @property
    def num_free(self) -> int:
        """Groups that a batch may go to now."""
        return len(self.own) + len(self.others)

    @property
    def num_idle(self) -> int:
        """Those of them that have nothing to do."""
        return len(self.own.idle) + len(self.others.idle)

    def loaded(self, record: GroupRecord, now_s: float) -> None:
        """A batch of the group began or ended."""
        self.place(record, now_s)
        if record.is_in_rotation:
            self.forecast.loaded(record, len(self.groups))

    def place(self, record: GroupRecord, now_s: float) -> None:
        """The group has changed in any way."""
        is_live = record.is_open and not record.is_leaving
        is_in_rotation = is_live and record.standing.state is State.SERVING
        if is_live is not record.is_live or is_in_rotation is not record.is_in_rotation:
            self._count(record, is_live, is_in_rotation)
        urn, num_free_places = self._urn_of(record, now_s)
        self.num_free_places += num_free_places - record.num_free_places
        record.num_free_places = num_free_places
        if urn is not record.urn:
            if record.urn is not None:
                record.urn.discard(record)
            if urn is not None:
                urn.add(record)
            record.urn = urn

    def _count(self, record: GroupRecord, is_live: bool, is_in_rotation: bool) -> None:
        self.num_live += is_live - record.is_live
        if is_live and not is_in_rotation:
            self.left_out[record] = None
        else:
            self.left_out.pop(record, None)
        was_in_rotation = record.is_in_rotation
        record.is_live, record.is_in_rotation = is_live, is_in_rotation
        if is_in_rotation and not was_in_rotation:
            self.forecast.enter(record)
            self.forecast.loaded(record, len(self.groups))
        elif was_in_rotation and not is_in_rotation:
            self.forecast.exit(record)

    def _urn_of(self, record: GroupRecord, now_s: float) -> tuple[Urn[GroupRecord] | None, int]:
        """Where the group belongs, and how many batches more it takes in ordinary service."""
        num_free = self.max_in_flight - len(record.in_flight)
        if not record.is_live or num_free <= 0 or now_s < record.rests_until_s:
            return None, 0
        if record.is_in_rotation:
            zone = self.others if self.zone and record.zone and record.zone != self.zone else self.own
            return (zone.busy if record.in_flight else zone.idle), num_free
        return (self.probes if record.awaits_probe else None), 0
