"""Whatever happens to a roster, its running sums are those of a look at every group, and its choices keep the rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from tensorway_orchestrator.group_record import GroupRecord, SentBatch
from tensorway_orchestrator.roster import Roster
from tensorway_orchestrator.routing_policy import EjectionPolicy, RoutingPolicy
from tensorway_orchestrator.standing import Failure, State
from tensorway_orchestrator.step_times import StepTimes

POLICY = RoutingPolicy(slow_start_s=1.0, ejection=EjectionPolicy(min_other_samples=3, min_slow_samples=2, first_back_off_s=0.5))
ROWS = st.integers(1, 8)


class RosterMachine(RuleBasedStateMachine):
    """Random lives of groups and batches."""

    groups: Bundle[GroupRecord] = Bundle("groups")
    batches: Bundle[SentBatch] = Bundle("batches")

    @initialize(seed=st.integers(0, 1000), max_in_flight=st.sampled_from((1, 2, 5)), zone=st.sampled_from(("", "a")))
    def begin(self, seed: int, max_in_flight: int, zone: str) -> None:
        self.now_s = 10.0
        self.num_joined = 0
        self.roster = Roster(8, random.Random(seed).randrange, max_in_flight, zone, POLICY)

    @rule(target=groups, zone=st.sampled_from(("", "a", "b")), has_history=st.booleans())
    def join(self, zone: str, has_history: bool) -> GroupRecord:
        self.num_joined += 1
        record = self.roster.join(f"g{self.num_joined}", zone, has_history=has_history)
        self.roster.opened(record, self.now_s)
        return record

    @rule(record=groups, what=st.sampled_from(("opened", "closed", "leaving")))
    def change(self, record: GroupRecord, what: str) -> None:
        if self.roster.find(record.id) is record:
            getattr(self.roster, what)(record, self.now_s)

    @rule(record=groups, rest_s=st.floats(0.0, 1.0))
    def rest(self, record: GroupRecord, rest_s: float) -> None:
        if self.roster.find(record.id) is record:
            self.roster.rests(record, self.now_s + rest_s, self.now_s)

    @rule(record=consumes(groups))
    def leave(self, record: GroupRecord) -> None:
        self.roster.leave(record, self.now_s)

    @rule(passed_s=st.floats(0.0, 1.0))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule(target=batches, rows=ROWS, avoid=st.sets(st.integers(1, 6), max_size=3))
    def send(self, rows: int, avoid: set[int]) -> SentBatch | None:
        avoided = frozenset(f"g{number}" for number in avoid)
        record = self.roster.choose(rows, avoided, self.now_s)
        serving = [other for other in self.roster if other.is_open and not other.is_leaving and other.standing.state is State.SERVING]
        free = [other for other in serving if len(other.in_flight) < self.roster.max_in_flight and other.rests_until_s <= self.now_s]
        others = [other for other in serving if other.id not in avoided]
        if record is None:
            assert not [other for other in free if other in others or not others]
            return None
        if record.standing.state is State.PROBING:
            assert not avoided
            assert not [batch for batch in record.in_flight if batch.sent_s >= record.standing.since_s]
            assert record.is_open
            assert not record.is_leaving
        else:
            assert record in free
            assert record.id not in avoided or not others
        return self.roster.began(record, rows, self.now_s)

    @rule(batch=consumes(batches), step_s=st.sampled_from((0.001, 0.01, 0.1, 3.0)))
    def answer(self, batch: SentBatch | None, step_s: float) -> None:
        if batch is not None:
            self.roster.ended(batch, self.now_s)
            self.roster.observed(batch, step_s, 0.0, self.now_s)

    @rule(batch=consumes(batches), failure=st.sampled_from(Failure), is_first=st.booleans())
    def fail(self, batch: SentBatch | None, failure: Failure, is_first: bool) -> None:
        if batch is not None:
            if is_first:
                self.roster.failed(batch, failure, self.now_s)
            self.roster.ended(batch, self.now_s)
            self.roster.failed(batch, failure, self.now_s)

    @rule(batch=consumes(batches), is_answered=st.booleans())
    def withdraw(self, batch: SentBatch | None, is_answered: bool) -> None:
        if batch is not None:
            self.roster.ended(batch, self.now_s)
            if is_answered:
                self.roster.answered(batch, self.now_s)

    @rule(ahead=st.integers(0, 100), rows=ROWS)
    def predict(self, ahead: int, rows: int) -> None:
        roster = self.roster
        finish_s = roster.predict_finish_s(ahead, rows, self.now_s)
        busy = [record for record in roster if record.is_in_rotation and record.in_flight]
        if finish_s is not None:
            assert finish_s >= self.now_s
            # Overdue groups are looked at now and then only, so their instants are bounds.
            on_time = [record.predicted_idle_s for record in busy if record.predicted_idle_s >= self.now_s]
            if len(on_time) == len(busy) and busy:
                assert roster.forecast.first_idle_s(self.now_s) == pytest.approx(min(on_time))

    @invariant()
    def counts_are_those_of_a_look_at_every_group(self) -> None:
        roster = self.roster
        roster.choose(1, (), self.now_s)  # takes note of the time
        live = [record for record in roster if record.is_open and not record.is_leaving]
        serving = [record for record in live if record.standing.state is State.SERVING]
        free = [record for record in serving if record.rests_until_s <= self.now_s and len(record.in_flight) < roster.max_in_flight]
        assert roster.num_live == len(live)
        assert roster.has_live == bool(live)
        assert roster.num_ejected == len(live) - len(serving)
        assert roster.num_ejected <= len(live) // 2
        assert roster.num_free == len(free)
        assert roster.num_free_places == sum(roster.max_in_flight - len(record.in_flight) for record in free)
        assert roster.rotation.num_idle == sum(not record.in_flight for record in free)
        far = [record for record in free if roster.zone and record.zone and record.zone != roster.zone]
        assert len(roster.rotation.others) == len(far)
        assert roster.forecast.num_groups == len(serving)

    @invariant()
    def sums_are_those_of_a_look_at_every_group(self) -> None:
        measured = [record for record in self.roster if record.is_in_rotation and record.step_times.num_samples]
        typical = StepTimes()
        for record in measured:
            typical.absorb(record.step_times)
        forecast = self.roster.forecast
        assert forecast.typical.num_samples == typical.num_samples
        assert forecast.typical.predict_s(5) == pytest.approx(typical.predict_s(5), rel=1e-6, abs=1e-9)
        rates = sum(8 / max(1e-6, record.step_times.predict_s(8)) for record in measured)
        num_new = forecast.num_groups - len(measured)
        if measured:
            rates += num_new * 8 / max(1e-6, typical.predict_s(8))
        slowness = [record.standing.slowness for record in self.roster if record.is_in_rotation]
        assert forecast.mean_slowness == pytest.approx(sum(slowness) / len(slowness) if slowness else 1.0)
        assert forecast.rows_per_s() == pytest.approx(rates, rel=1e-6)

    @invariant()
    def what_groups_have_to_do_is_what_was_sent(self) -> None:
        for record in self.roster:
            assert record.predicted_idle_s == pytest.approx(
                record._runs_since_s + sum(batch.step_s for batch in record.in_flight) if record.in_flight else 0.0
            )


TestRosterMachine = RosterMachine.TestCase
TestRosterMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
