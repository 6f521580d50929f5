"""What the rollout service measures. Owns the names."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from penstock.contracts.weight_sources import LeftFor
from penstock.errors import WeightsError, WeightsMismatchError
from penstock.runtime.metrics import SecondsCounter

GROUP_BUCKETS_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
UPDATE_BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
GroupOutcome = Literal["published", "late", "aborted", "engine_died", "rejected", "failed", "malformed", "returned"]
SENDERS = ("server", "trainer")
FailedUpdate = Literal["files", "engine", "late", "mismatch"]


class RolloutMetrics:
    """Objects of prometheus_client on a registry of their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        ProcessCollector(registry=registry)
        self._groups = Counter(
            "penstock_rollout_groups",
            "Groups, and calls of agents, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        for outcome in get_args(GroupOutcome):
            self._groups.labels(outcome)
        self._completion_tokens = Counter(
            "penstock_rollout_completion_tokens",
            "Sampled tokens that were handed over, or answered a call.",
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "penstock_rollout_prompt_tokens",
            "Prompt tokens of groups that were handed over, and of answered calls.",
            registry=registry,
        )
        self._cached_tokens = Counter(
            "penstock_rollout_cached_prompt_tokens",
            "Of the prompt tokens of answered calls: those that the engine had in its cache.",
            registry=registry,
        )
        self._refused = Counter(
            "penstock_rollout_refused_calls",
            "Calls that were answered with 503: the weights that they need are not served, or too many calls wait.",
            registry=registry,
        )
        self._waiting = Gauge("penstock_rollout_waiting_calls", "Calls that wait for room.", registry=registry)
        self._duration = Histogram(
            "penstock_rollout_group_duration_seconds",
            "From request to answer of a group.",
            registry=registry,
            buckets=GROUP_BUCKETS_SECONDS,
        )
        self._inflight = Gauge("penstock_rollout_inflight_groups", "Groups that run on the engine.", registry=registry)
        self._version = Gauge(
            "penstock_rollout_policy_version", "Policy version served; -1 before any.", registry=registry
        )
        self._version.set(-1)
        self._update = Histogram(
            "penstock_rollout_weight_update_duration_seconds",
            "From the start of a weight update until generation goes on.",
            ["transport"],
            registry=registry,
            buckets=UPDATE_BUCKETS_SECONDS,
        )
        self._updates_failed = Counter(
            "penstock_rollout_weight_updates_failed",
            "Weight updates that failed, each of which fenced the server.",
            ["reason"],
            registry=registry,
        )
        for reason in get_args(FailedUpdate):
            self._updates_failed.labels(reason)
        self._fenced = Gauge(
            "penstock_rollout_fenced", "1 from a failed weight update until one has succeeded.", registry=registry
        )
        self._canary = Gauge(
            "penstock_rollout_canary_difference_nats",
            "Mean difference between the engine's and the trainer's log-probabilities of the canary tokens.",
            registry=registry,
        )
        self._paused = Counter(
            "penstock_rollout_paused_seconds", "Time in which generation was paused for new weights.", registry=registry
        )
        self._busy = SecondsCounter(
            "penstock_rollout_generation_busy_seconds",
            "Time in which at least one training group ran.",
            registry=registry,
            clock=clock,
        )
        self._asleep = SecondsCounter(
            "penstock_rollout_asleep_seconds",
            "Time in which the engine had given its GPU memory to the trainer (trainer.take_turns).",
            registry=registry,
            clock=clock,
        )
        self._received = Counter(
            "penstock_rollout_relay_received_bytes",
            "Bytes of weights that came by a relay tree, by who sent them.",
            ["sender"],
            registry=registry,
        )
        for sender in SENDERS:
            self._received.labels(sender)
        self._sent = Counter(
            "penstock_rollout_relay_sent_bytes", "Bytes of weights sent on to other servers.", registry=registry
        )
        self._left = Counter(
            "penstock_rollout_relay_parents_left",
            "Parents that were left for the next one while they sent weights, by what they were.",
            ["reason"],
            registry=registry,
        )
        for reason in get_args(LeftFor):
            self._left.labels(reason)
        self._restarts = Counter("penstock_rollout_engine_restarts", "Engines started anew.", registry=registry)

    @contextmanager
    def running(self, *, training: bool) -> Iterator[None]:
        """Around one group's request; training groups make the service busy, evaluation does not."""
        start = self._clock()
        self._inflight.inc()
        try:
            with self._busy.counting() if training else nullcontext():
                yield
        finally:
            self._inflight.dec()
            self._duration.observe(self._clock() - start)

    def group_ended(
        self, outcome: GroupOutcome, prompt_tokens: int = 0, completion_tokens: int = 0, cached_tokens: int = 0
    ) -> None:
        self._groups.labels(outcome).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)
        self._cached_tokens.inc(cached_tokens)

    def call_refused(self) -> None:
        self._refused.inc()

    def count_waiting(self, number: Callable[[], int]) -> None:
        """`number`: of the calls that wait now."""
        self._waiting.set_function(number)

    def weights_loaded(self, transport: str, seconds: float, paused_seconds: float, version: int) -> None:
        self._update.labels(transport).observe(seconds)
        self._paused.inc(paused_seconds)
        self._version.set(version)
        self._fenced.set(0)

    def weights_kept(self) -> None:
        """What is wanted is served already."""
        self._fenced.set(0)

    def weights_failed(self, error: Exception) -> None:
        self._updates_failed.labels(_reason(error)).inc()
        self._fenced.set(1)

    def canary_answered(self, difference: float) -> None:
        self._canary.set(difference)

    def asleep(self) -> AbstractContextManager[None]:
        """Around a sleep of the engine."""
        return self._asleep.counting()

    def weights_lost(self) -> None:
        self._version.set(-1)

    def relay_received(self, num_bytes: int, from_trainer: bool) -> None:
        self._received.labels(SENDERS[from_trainer]).inc(num_bytes)

    def relay_sent(self, num_bytes: int) -> None:
        self._sent.inc(num_bytes)

    def parent_left(self, reason: LeftFor) -> None:
        self._left.labels(reason).inc()

    def engine_restarted(self) -> None:
        self._restarts.inc()


def _reason(error: Exception) -> FailedUpdate:
    """What a failed update is counted as."""
    match error:
        case TimeoutError():
            return "late"
        case WeightsMismatchError():
            return "mismatch"
        case WeightsError():
            return "files"
    return "engine"
