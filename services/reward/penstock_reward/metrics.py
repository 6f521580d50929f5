"""The reward service's metrics.

Owns their names. Every failed attempt is counted, also if a retry succeeds: so a verifier that fails half the time
shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from penstock_reward.processes.messages import FailureKind, Outcome

DURATION_BUCKETS_SECONDS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
VALUE_BUCKETS = (-10, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 2, 10)
TEACHER_BUCKETS_SECONDS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
GroupOutcome = Literal["scored", "buried", "late"]
TeacherFailure = Literal["refused", "died", "timeout", "error"]


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
            "1 while the function's breaker keeps calls back, else 0; of `teacher`: while one of its servers is down",
            ["function"],
            registry=self.registry,
        )
        self._parked = Gauge(
            "penstock_reward_groups_parked", "Groups held until a breaker closes", registry=self.registry
        )

        self._teacher_duration = Histogram(
            "penstock_reward_teacher_request_duration_seconds",
            "From a request to a server of the teacher to its answer",
            buckets=TEACHER_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._teacher_tokens = Counter(
            "penstock_reward_teacher_tokens",
            "Log-probabilities that servers of the teacher answered",
            registry=self.registry,
        )
        self._teacher_failures = Counter(
            "penstock_reward_teacher_failures",
            "Requests to servers of the teacher that failed, each attempt counted",
            ["reason"],
            registry=self.registry,
        )
        for reason in get_args(TeacherFailure):
            self._teacher_failures.labels(reason)
        self._teacher_down = Gauge(
            "penstock_reward_teacher_servers_down",
            "Servers of the teacher that are asked nothing until they answer a probe",
            registry=self.registry,
        )
        self._at_teacher = Gauge(
            "penstock_reward_groups_at_teacher",
            "Groups that wait for answers of the teacher",
            registry=self.registry,
        )

    @contextmanager
    def at_teacher(self) -> Iterator[None]:
        """Around all questions about one group."""
        with self._at_teacher.track_inprogress():
            yield

    def watch_teacher(self, num_down: Callable[[], int]) -> None:
        """Read the number of servers that are down whenever the metrics are read; an alert looks at their breaker."""
        self._teacher_down.set_function(num_down)
        self._breaker_open.labels("teacher").set_function(lambda: num_down() > 0)

    def teacher_answered(self, seconds: float, num_tokens: int) -> None:
        self._teacher_duration.observe(seconds)
        self._teacher_tokens.inc(num_tokens)

    def teacher_failed(self, reason: TeacherFailure) -> None:
        self._teacher_failures.labels(reason).inc()

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
