"""The agent service's metrics.

Owns their names. Every failed attempt is counted, also if a later one succeeds: so an environment that fails half the
time shows.
"""

from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from penstock.contracts import Episode, EpisodeEnd
from penstock.contracts.vocabulary import BranchReason

EPISODE_BUCKETS_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
CALL_BUCKETS_SECONDS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
OWN_BUCKETS_SECONDS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
TURN_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)

GroupOutcome = Literal["published", "returned", "late", "malformed"]
WaitsFor = Literal["model", "environment"]
TokenKind = Literal["sampled", "context", "sent", "cached"]
AskAgainReason = Literal["busy", "engine_died", "failed", "unreachable", "gone", "malformed"]
"""Why a rollout server did not answer a call.

busy: 503; engine_died: while it ran the call; failed: another 5xx; unreachable: no connection, or it broke; gone: no
longer in the queue; malformed: an answer that is none of this release.
"""


class AgentMetrics:
    """Prometheus objects on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._declare_episodes()
        self._declare_calls()
        self._groups = self._counter(
            "penstock_agent_groups",
            "Tickets taken: published, returned (given back unfinished), late (another had taken over), malformed",
            "outcome",
            get_args(GroupOutcome),
        )
        self._kept = self._counter(
            "penstock_agent_episodes_kept", "Episodes that an earlier holder of their ticket had finished"
        )
        self._breaker_open = Gauge(
            "penstock_agent_breaker_open",
            "1 while the environment fails, so that one episode at a time tries, else 0",
            registry=self.registry,
        )
        self._sessions = Gauge(
            "penstock_agent_sessions_running", "Attempts at episodes that run", registry=self.registry
        )
        self._waiting = Gauge(
            "penstock_agent_calls_waiting",
            "Calls of the model for which no server can be asked",
            registry=self.registry,
        )

    def _declare_episodes(self) -> None:
        ends = get_args(EpisodeEnd)
        self._episodes = self._counter("penstock_agent_episodes", "Episodes that ended, by their end", "end", ends)
        self._attempts = self._counter(
            "penstock_agent_attempts", "Attempts at episodes, those that failed and were repeated included"
        )
        self._failures = self._counter(
            "penstock_agent_failures",
            "Attempts without a score: failure (of the environment or of what it needs) or timeout",
            "kind",
            ("failure", "timeout"),
        )
        self._turns = Histogram(
            "penstock_agent_turns",
            "Turns of an episode that has a score",
            buckets=TURN_BUCKETS,
            registry=self.registry,
        )
        self._tool_calls = self._counter("penstock_agent_tool_calls", "Calls of tools that the model asked for")
        self._failed_tool_calls = self._counter(
            "penstock_agent_tool_calls_failed", "Of these, those that could not be parsed or that a tool refused"
        )
        self._branches = self._counter(
            "penstock_agent_branches",
            "Calls that could not continue the tokens before them, by reason",
            "reason",
            get_args(BranchReason),
        )
        self._tokens = self._counter(
            "penstock_agent_tokens",
            "Tokens of episodes with a score: sampled, context (each once), sent to servers, cached there",
            "kind",
            get_args(TokenKind),
        )
        self._duration = Histogram(
            "penstock_agent_episode_duration_seconds",
            "Duration of an attempt at an episode",
            buckets=EPISODE_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._waited = self._counter(
            "penstock_agent_waited_seconds",
            "Time of all attempts, by what they waited for: the model or the environment",
            "waits_for",
            get_args(WaitsFor),
        )

    def _declare_calls(self) -> None:
        self._call_duration = Histogram(
            "penstock_agent_call_duration_seconds",
            "Duration of a call of the model, with all waits for a server",
            buckets=CALL_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._own_duration = Histogram(
            "penstock_agent_call_own_seconds",
            "Of it, the time that this service computed: rendering, recording, parsing",
            buckets=OWN_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._repeated = self._counter(
            "penstock_agent_requests_repeated", "Requests that were a client's repetition of one that was known"
        )
        self._refused = self._counter(
            "penstock_agent_requests_refused", "Requests of agents that were answered with an error", "code", ()
        )
        self._asked_again = self._counter(
            "penstock_agent_calls_asked_again",
            "Attempts at a call that a rollout server did not answer, by reason",
            "reason",
            get_args(AskAgainReason),
        )

    def _counter(self, name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
        """A counter; its samples with these values exist from the start."""
        counter = Counter(name, text, [label] if label else [], registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def watch(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read the numbers of running attempts and of waiting calls whenever the metrics are read."""
        self._sessions.set_function(running)
        self._waiting.set_function(waiting)

    def breaker_changed(self, is_open: bool) -> None:
        self._breaker_open.set(is_open)

    def group_ended(self, outcome: GroupOutcome, num_kept: int = 0) -> None:
        self._groups.labels(outcome).inc()
        self._kept.inc(num_kept)

    def attempt_ended(self, end: EpisodeEnd, *, has_score: bool, seconds: float, model_seconds: float) -> None:
        """model_seconds: of its `seconds`, those in which a call of the model ran."""
        self._attempts.inc()
        self._duration.observe(seconds)
        self._waited.labels("model").inc(model_seconds)
        self._waited.labels("environment").inc(max(0.0, seconds - model_seconds))
        if not has_score:
            self._failures.labels("timeout" if end == "timeout" else "failure").inc()

    def episode_ended(self, episode: Episode) -> None:
        self._episodes.labels(episode.end).inc()
        if episode.score.value is None:
            return
        counts = episode.counts
        self._turns.observe(counts.num_turns)
        self._tool_calls.inc(counts.num_tool_calls)
        self._failed_tool_calls.inc(counts.num_failed_tool_calls)
        for reason, number in counts.branches.items():
            self._branches.labels(reason).inc(number)
        for kind, number in (
            ("sampled", episode.num_tokens),
            ("context", episode.num_context_tokens),
            ("sent", counts.num_prompt_tokens),
            ("cached", counts.num_cached_tokens),
        ):
            self._tokens.labels(kind).inc(number)

    def call_answered(self, seconds: float, own_seconds: float) -> None:
        self._call_duration.observe(seconds)
        self._own_duration.observe(own_seconds)

    def call_repeated(self) -> None:
        self._repeated.inc()

    def request_refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def asked_again(self, reason: AskAgainReason) -> None:
        self._asked_again.labels(reason).inc()
