"""What the journal says about one fault: every request is accounted for, and each aim is met or missed by a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tensorway.errors import Status
from tests.chaos.journal import Journal, Record

#: An answer or a failure this much after its deadline is late.
LATE_S: Final = 0.05
#: Success has to last so long to count as recovery.
STEADY_S: Final = 2.0
#: A steady answer takes no longer than this many times the undisturbed 99th percentile, or than this.
_STEADY_TIMES: Final = 4.0
_STEADY_LEAST_S: Final = 0.3
#: Share of the answers within STEADY_S that must be steady (all must succeed).
_STEADY_SHARE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Aims:
    """What must hold of one fault. Counts are the most that may be."""

    wrong: int = 0
    twice: int = 0
    lost: int = 0
    #: Failures with a status that tells the client not to try again.
    refused: int = 0
    late: int = 0
    least_success: float = 0.999
    #: Whether success must become steady again while it is watched.
    steady: bool = True
    #: Longest time from the fault's end until every member and group is back, seconds.
    whole_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Window:
    """One scenario's instants on `time.monotonic()`: load is watched from `from_s`, the fault lasts from `fault_s` to `undone_s`."""

    from_s: float
    fault_s: float
    undone_s: float
    to_s: float


@dataclass(slots=True)
class Verdict:
    """The figures of one scenario. Durations in seconds, latencies those of identity and embedding requests."""

    sent: int = 0
    ok: int = 0
    #: Failures by status.
    failed: Counter[str] = field(default_factory=Counter)
    #: Given up by the client with a retryable status or at its deadline, though the mesh had living parts.
    lost: int = 0
    #: Failed with a status that is not retryable.
    refused: int = 0
    wrong: int = 0
    twice: int = 0
    late: int = 0
    #: Never ended, not even by their deadlines.
    open: int = 0
    streams: int = 0
    tokens: int = 0
    #: From the fault to the first instant that begins STEADY_S of steady success; None where there is none.
    recovery_s: float | None = None
    p99_before_s: float = 0.0
    p99_during_s: float = 0.0
    p99_after_s: float = 0.0
    #: The longest that any request took.
    slowest_s: float = 0.0
    #: The first requests that were not as they should be, a few of each sort.
    examples: list[str] = field(default_factory=list)
    sorts: Counter[str] = field(default_factory=Counter)

    @property
    def success(self) -> float:
        return self.ok / self.sent if self.sent else 0.0

    def misses(self, aims: Aims) -> list[str]:
        """Every aim that was missed, with its figure."""
        found = [
            f"{count} {name}, at most {most}"
            for name, count, most in (
                ("wrong", self.wrong, aims.wrong), ("twice", self.twice, aims.twice), ("lost", self.lost, aims.lost),
                ("refused", self.refused, aims.refused), ("late", self.late, aims.late), ("without an end", self.open, 0),
            )
            if count > most
        ]
        if found and self.failed:
            found.append(f"failed with {', '.join(f'{status} {count}' for status, count in self.failed.most_common())}")
        if not self.sent:
            found.append("nothing was sent")
        elif self.success < aims.least_success:
            found.append(f"success {self.success:.3%}, at least {aims.least_success:.1%}")
        if aims.steady and self.recovery_s is None:
            found.append("no steady success after the fault")
        return found


_EXAMPLES_OF_A_SORT: Final = 3
_LOST: Final = (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED)


def judge(journal: Journal, window: Window) -> Verdict:
    """The figures of the requests that were sent within a window. To be asked once all of them have ended."""
    records = journal.between(window.from_s, window.to_s)
    verdict = Verdict(sent=len(records))
    for record in records:
        _count(verdict, record, journal)
    before = journal.between(window.from_s, window.fault_s)
    verdict.p99_before_s = percentile(before, 0.99)
    verdict.p99_during_s = percentile(journal.between(window.fault_s, window.undone_s), 0.99)
    verdict.p99_after_s = percentile(journal.between(window.undone_s, window.to_s), 0.99)
    verdict.slowest_s = max((record.took_s for record in records if record.kind != "stream" and record.ended_s is not None), default=0.0)
    bound_s = max(_STEADY_TIMES * verdict.p99_before_s, _STEADY_LEAST_S)
    steady_s = first_steady(journal.between(window.fault_s, window.to_s), window.fault_s, window.to_s, bound_s)
    verdict.recovery_s = None if steady_s is None else steady_s - window.fault_s
    return verdict


def _count(verdict: Verdict, record: Record, journal: Journal) -> None:
    complaints = []
    if record.ended_s is None:
        verdict.open += 1
        complaints.append("never ended")
    elif record.is_ok:
        verdict.ok += not record.wrong and not record.twice
    else:
        assert record.status is not None
        verdict.failed[record.status.name] += 1
        is_lost = record.is_retryable or record.status in _LOST
        verdict.lost += is_lost
        verdict.refused += not is_lost
        complaints.append(f"{record.status.name} {record.error}")
    if record.wrong:
        verdict.wrong += 1
        complaints.append(f"wrong: {record.wrong}")
    if record.twice or record.num_answers > 1:
        verdict.twice += 1
        complaints.append(f"twice: {record.twice or f'{record.num_answers} answers'}")
    if record.ended_s is not None and is_late(record, journal):
        verdict.late += 1
        complaints.append(f"{record.ended_s - record.deadline_s:.3f} s after its deadline")
    if record.kind == "stream":
        verdict.streams += 1
        verdict.tokens += record.num_tokens
    sort = f"{record.kind} {record.status} {record.wrong[:20]} {record.twice[:20]}"
    verdict.sorts[sort] += bool(complaints)
    if complaints and verdict.sorts[sort] <= _EXAMPLES_OF_A_SORT:
        verdict.examples.append(f"{record.kind} {record.id} after {record.took_s:.2f} s: {'; '.join(complaints)}")


def is_late(record: Record, journal: Journal) -> bool:
    """Whether it ended more than LATE_S past its deadline, beyond what this process itself was late to look."""
    if record.ended_s is None or record.ended_s <= record.deadline_s + LATE_S:
        return False
    return record.ended_s > record.deadline_s + LATE_S + journal.own_delay_s(record.deadline_s, record.ended_s)


def first_steady(records: Sequence[Record], from_s: float, to_s: float, bound_s: float) -> float | None:
    """The first instant that begins STEADY_S in which all requests sent succeed, nearly all of them within `bound_s`; streams may take what
    they take."""
    starts = [from_s, *(record.sent_s + 1e-6 for record in records if not _is_steady(record, bound_s))]
    for start_s in starts:
        if start_s + STEADY_S > to_s:
            return None
        inside = [record for record in records if start_s <= record.sent_s < start_s + STEADY_S]
        steady = sum(_is_steady(record, bound_s) for record in inside)
        if inside and all(record.is_ok for record in inside) and steady >= _STEADY_SHARE * len(inside):
            return start_s
    return None


def _is_steady(record: Record, bound_s: float) -> bool:
    return record.is_ok and (record.kind == "stream" or record.took_s <= bound_s)


def percentile(records: Sequence[Record], share: float) -> float:
    """Of the time that answers took, streams left out; 0 where there are none."""
    times = sorted(record.took_s for record in records if record.is_ok and record.kind != "stream")
    return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0
