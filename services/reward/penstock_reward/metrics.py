"""The reward service's metrics.

Owns their names. Every failed attempt is counted, also if a retry succeeds: so a verifier that fails half the time
shows.
"""

from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from penstock_reward.processes.messages import FailureKind, Outcome

DURATION_BUCKETS_SECONDS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
VALUE_BUCKETS = (-10, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 2, 10)
GroupOutcome = Literal["scored", "buried", "late"]


class RewardMetrics:
    """Prometheus objects on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._duration = Histogram(
            "penstock_reward_score_duration_seconds",
            "Duration of one call of a reward function, failed ones included",
            ["function"],
            buckets=DURATION_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._value = Histogram(
            "penstock_reward_value",
            "Scores of training completions; failed ones have none",
            buckets=VALUE_BUCKETS,
            registry=self.registry,
        )
        self._failures = Counter(
            "penstock_reward_failures",
            "Failed calls of reward functions, each attempt counted",
            ["reason"],
            registry=self.registry,
        )
        for reason in get_args(FailureKind):
            self._failures.labels(reason)
        self._groups = Counter(
            "penstock_reward_groups",
            "Groups taken from the queue: scored, buried (malformed), late (another had taken over)",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in get_args(GroupOutcome):
            self._groups.labels(outcome)
        self._workers = Gauge(
            "penstock_reward_workers_ready", "Worker processes that can run a call", registry=self.registry
        )
        self._breaker_open = Gauge(
            "penstock_reward_breaker_open",
            "1 while the function's circuit breaker keeps calls back (open or half open), else 0",
            ["function"],
            registry=self.registry,
        )
        self._parked = Gauge(
            "penstock_reward_groups_parked", "Groups held until a breaker closes", registry=self.registry
        )

    def breaker_changed(self, function: str, is_open: bool) -> None:
        self._breaker_open.labels(function).set(is_open)

    def watch_parked(self, num_parked: Callable[[], int]) -> None:
        """Read the number of parked groups whenever the metrics are read."""
        self._parked.set_function(num_parked)

    def watch_workers(self, num_ready: Callable[[], int]) -> None:
        """Read the number of ready workers whenever the metrics are read."""
        self._workers.set_function(num_ready)

    def call_ended(self, function: str, outcome: Outcome) -> None:
        self._duration.labels(function).observe(outcome.seconds)
        if outcome.kind is not None:
            self._failures.labels(outcome.kind).inc()

    def failed_without_call(self, kind: FailureKind) -> None:
        self._failures.labels(kind).inc()

    def scored(self, value: float) -> None:
        self._value.observe(value)

    def group_ended(self, outcome: GroupOutcome) -> None:
        self._groups.labels(outcome).inc()
