"""The numbers of routing and ejection, with their reasons. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EjectionPolicy:
    """When a group is left out, for how long, and how it comes back.

    Sources: Envoy's outlier detection (consecutive failures, a failure share with a minimum volume, a bound on the share of hosts ejected,
    times that grow with each ejection), Finagle's failure accrual (probes before a revival), Nygard's circuit breaker ("Release It!",
    2nd edition 2018: closed, open, half-open).
    """

    #: Failures in a row. Two happen to a healthy group (a link that breaks under a batch, then under its successor); Finagle and Envoy say
    #: five, but they count requests, and here every failure is a whole batch.
    max_failures: int = 3
    #: A group that fails now and then may never fail three times in a row: more than half within about `failure_window_s` is too much.
    max_failure_share: float = 0.5
    failure_window_s: float = 10.0
    #: Outcomes within the window before the share means anything.
    min_outcomes: float = 10.0
    #: A batch whose deadline passed speaks against its group only where it took more than this many times what was predicted: most
    #: deadlines that pass were too short, or the batch left too late.
    timeout_factor: float = 3.0
    #: The same, in seconds, while the revision has no measured steps.
    first_timeout_s: float = 1.0
    #: Steps that take this many times what the others' take. Machines in one mesh differ by up to four and are no outliers: their own step
    #: times already give them less.
    slow_factor: float = 5.0
    #: Added to what others take: a millisecond's step is five times as long whenever the kernel looks elsewhere.
    slow_slack_s: float = 0.005
    #: Weight of the newest step in the mean that is judged. A single step counts as at most twice `slow_factor`: it takes three in a row.
    slow_weight: float = 0.2
    #: Steps measured before a group can be called slow, and steps that the others must have run.
    min_slow_samples: int = 5
    min_other_samples: int = 20
    #: Groups left out, as a share of the live ones, rounded down: when most groups fail, the fault is elsewhere and leaving them out would
    #: turn a bad service into none (Envoy's panic threshold). So the only group is never left out.
    max_ejected_share: float = 0.5
    #: First time out, and the longest, seconds: what is really dead loses its registration, so a group that is left out may be well again
    #: at any time, and is missed while the others are busy (Finagle and Envoy, who cannot know, wait up to 300 s). The time doubles with
    #: every ejection in a row, and half of it is random, so that groups that failed together do not come back together (equal jitter;
    #: Brooker, "Exponential backoff and jitter", 2015).
    first_back_off_s: float = 1.0
    max_back_off_s: float = 10.0
    #: A group that has served for so long since its last ejection begins at `first_back_off_s` again.
    forgive_after_s: float = 60.0
    #: Ordinary batches between two probes while other groups have room: a probe may cost its requests an attempt.
    probe_gap: int = 8


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """How a batch finds its group."""

    #: Groups compared among the idle ones, and as many among the busy ones. Two are much better than one (Mitzenmacher, 2001); with groups
    #: of different speed a few more pay, see docs/routing.md.
    num_draws: int = 3
    #: A group of another zone must be predicted to finish earlier by this much: the way there and back, seconds…
    cross_zone_s: float = 0.002
    #: …and a share of the predicted time: traffic between zones costs money, so it is worth a little waiting.
    cross_zone_share: float = 0.25
    #: A new or returning group's share grows over so many seconds: its first steps are slow (allocators, kernels chosen by trying, caches).
    slow_start_s: float = 5.0
    #: Share of a normal group that it begins with.
    first_share: float = 0.1
    #: A new group's step times begin as the others', which count as this many steps.
    seed_steps: float = 5.0
    #: Steps that a revision must have run before a prediction may refuse a request.
    min_samples: int = 10
    ejection: EjectionPolicy = field(default_factory=EjectionPolicy)
