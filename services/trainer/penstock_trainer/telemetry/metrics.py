"""The trainer's Prometheus metrics, on their own registry.

Owns names and types; docs/metrics.md is generated from them. A figure without a value yet is NaN, which Prometheus
keeps apart from 0.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from penstock.config import Config
from penstock.contracts.vocabulary import MAIN_SET
from penstock.contracts.weight_sources import LeftFor
from penstock.runtime.metrics import SecondsCounter
from penstock_trainer.telemetry.episode_metrics import EpisodeMetrics
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.queue_metrics import QueueMetrics
from penstock_trainer.telemetry.records import StepLine

MASKED = "masked_"
NON_FINITE = "non_finite"
OUTCOMES = ("trained", "unchanged", NON_FINITE)
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
STALENESS_BUCKETS = (0, 1, 2, 4, 8, 16, 32)
STATISTICS = {
    "reward_mean": "Mean reward of the last batch",
    "loss": "Loss of the last step",
    "grad_norm": "Gradient norm of the last step, before clipping",
    "entropy": "Entropy of the policy at trained tokens, in nats",
    "reference_kl": "KL divergence from the reference policy, in nats",
    "teacher_kl": "KL divergence from the teacher, in nats; estimated on the policy's own tokens",
    "behaviour_kl": "KL divergence from the sampler's log-probabilities, in nats",
    "effective_sample_size_ratio": "Effective sample size of the importance weights, 0 to 1",
    "clipped_ratio": "Share of trained tokens whose surrogate was clipped",
    "clipped_ratio_low": "Share of trained tokens clipped because their ratio was too low",
    "clipped_ratio_high": "Share of trained tokens clipped because their ratio was too high",
    "ratio_min": "Smallest ratio of policy to sampler of a trained token",
    "ratio_mean": "Mean ratio of policy to sampler",
    "ratio_max": "Largest ratio of policy to sampler of a trained token",
    "expert_entropy": "Entropy of the use of experts, mean over layers, 0 to 1: 1 if all are used alike",
    "expert_busiest_share": "Largest share that one expert got of its layer's routed rows",
    "learning_rate": "Learning rate of the last step",
    "reward_std": "Standard deviation of the rewards of the last batch",
    "reward_min": "Smallest reward of the last batch",
    "reward_max": "Largest reward of the last batch",
    "shaped_reward_mean": "Mean reward of the last batch after reward.scale, reward.clip and penalties of length",
    "shaped_reward_std": "Standard deviation of these",
    "clipped_reward_ratio": "Share of the completions of the last batch whose reward was outside of reward.clip",
    "failed_reward_ratio": "Share of the completions of the last batch whose reward failed",
    "no_signal_ratio": "Share of the groups of the last batch without an advantage: equal rewards, or fewer than two",
    "truncated_ratio": "Share of the completions of the last batch that reached a limit of length",
    "advantage_std": "Root mean square of the advantages of the last batch",
    "advantage_min": "Smallest advantage of the last batch",
    "advantage_max": "Largest advantage of the last batch",
    "length_generated": "Mean tokens of the completions of the last batch",
    "length_trained": "Mean tokens of the completions with an advantage",
    "length_bias": "length_trained over length_generated: 1 without bias",
}

SET_FIGURES = {
    "reward_mean": "Mean reward of a training set in the last batch",
    "no_signal_ratio": "Share of the groups of a training set in the last batch without an advantage",
}


class TrainerMetrics:
    """All metrics of one trainer."""

    def __init__(self, *, of_episodes: bool = True) -> None:
        """`of_episodes`: with the figures that only a run of episodes has."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.queue = QueueMetrics(registry, of_episodes=of_episodes)
        self._episodes = EpisodeMetrics(registry) if of_episodes else None

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"penstock_{name}", text, labels, registry=registry)

        def unknown(name: str, text: str) -> Gauge:
            made = gauge(name, text)
            made.set(math.nan)
            return made

        def of_sets(name: str, text: str) -> Gauge:
            made = gauge(name, text, "set")
            made.labels(set=MAIN_SET).set(math.nan)
            return made

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"penstock_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"penstock_{name}", text, labels, buckets=SECONDS_BUCKETS, registry=registry)

        self._steps = counter("trainer_steps", "Training steps of this life of the trainer", "outcome")
        for outcome in OUTCOMES:
            self._steps.labels(outcome=outcome)
        self._run_steps = gauge("trainer_run_steps", "Steps of the run that are trained, over all lives of the trainer")
        self._run_steps_planned = gauge("trainer_run_steps_planned", "Steps of the full run if no ticket is dropped")
        self.policy_version = gauge("trainer_policy_version", "Version of the trainer's weights")
        self._step_duration = seconds("trainer_step_duration_seconds", "Time of a step by phase", "phase")
        self._generation = counter("trainer_generation_seconds", "Time in which a training request ran on any server")
        self._tokens = counter("trainer_tokens", "Completion tokens trained")
        self._staleness = Histogram(
            "penstock_trainer_staleness_versions",
            "Versions between generation and training, per completion",
            buckets=STALENESS_BUCKETS,
            registry=registry,
        )
        self._staleness_mean = unknown("trainer_staleness_mean_versions", "Mean staleness of the last batch")
        self._staleness_limit = gauge("trainer_staleness_limit_versions", "staleness.max_staleness of the run")
        self._masked = gauge("trainer_masked_ratio", "Share of trained tokens left out of the loss", "reason")
        self._statistics = {name: unknown(f"trainer_{name}", text) for name, text in STATISTICS.items()}
        self._function_means = gauge(
            "trainer_reward_function_mean", "Mean value of a reward function in the last batch, unweighted", "function"
        )
        self._functions: set[str] = set()
        self._sets: set[str] = set()
        self._set_prompts = counter("trainer_set_prompts", "Prompts trained, by set (data.train_sets)", "set")
        self._set_figures = {name: gauge(f"trainer_set_{name}", text, "set") for name, text in SET_FIGURES.items()}
        self._reasons: set[str] = set()
        self.idle = SecondsCounter(
            "penstock_trainer_idle_seconds", "Time spent waiting for a batch or for a push", registry=registry
        )
        self._pushes = counter("trainer_weight_pushes", "Pushes of a version to one server", "outcome")
        for outcome in ("live", "fenced"):
            self._pushes.labels(outcome=outcome)
        self._left = counter(
            "trainer_relay_parents_left",
            "Parents that servers left for the next one, by what they were",
            "reason",
        )
        for reason in get_args(LeftFor):
            self._left.labels(reason=reason)
        self._relay_sent = counter("trainer_relay_sent_bytes", "Bytes of weights that the trainer sent to servers")
        self.push_exposed = counter(
            "trainer_weight_exposed_seconds",
            "Time that training waited or generation paused for weights",
            "part",
        )
        for part in ("training", "generation"):
            self.push_exposed.labels(part=part)
        self._turns = counter(
            "trainer_turn_seconds",
            "Time by who has the GPUs: engines, trainer, or on the way to one of them (trainer.take_turns)",
            "phase",
        )
        self._without_progress = gauge(
            "trainer_without_progress_seconds", "Time without a step, an arrival, a push or work of the trainer's own"
        )
        self._stall_limit = gauge("trainer_stall_limit_seconds", "Without progress for this long, the trainer exits")
        self._publish_duration = seconds(
            "trainer_weight_publish_duration_seconds", "Time to push a version to all servers"
        )
        self._checkpoint_duration = seconds(
            "trainer_checkpoint_duration_seconds", "Time to write a checkpoint, in parallel to training"
        )
        self.checkpoint_exposed = seconds(
            "trainer_checkpoint_exposed_seconds", "Time that training stood still for a checkpoint's copy"
        )
        self._last = gauge(
            "trainer_last_event_timestamp_seconds",
            "When the last step, push, checkpoint or step that was not finite ended, in Unix seconds",
            "event",
        )
        self._heldout_accuracy = of_sets(
            "eval_accuracy_ratio", "Share of the held-out prompts with a reward that were answered right"
        )
        self._first_accuracy = of_sets("eval_first_accuracy_ratio", "The same share at the first evaluation of the run")
        self._heldout_failed = of_sets(
            "eval_failed_prompts", "Held-out prompts without a reward at the last evaluation, in no share"
        )
        self._gap_to_ideal = unknown(
            "trainer_gap_to_ideal_ratio",
            "Step time over the longer of generation and training time, minus 1, over the last 10 steps",
        )
        self.tracking_dropped = counter(
            "trainer_tracking_dropped", "Steps and evaluations that a tracker did not take", "tracker", "reason"
        )

    def show_limits(self, config: Config, planned_steps: int) -> None:
        """Show the limits and the planned steps of the configuration."""
        self._staleness_limit.set(config.staleness.max_staleness)
        self._stall_limit.set(config.stall_seconds)
        self._run_steps_planned.set(planned_steps)

    def turn_ended(self, holder: str, seconds: float) -> None:
        """Count the seconds for which `holder` had the GPUs."""
        self._turns.labels(phase=holder).inc(seconds)

    def watch_progress(self, seconds_without: Callable[[], float]) -> None:
        """Read the time without progress whenever the metrics are read."""
        self._without_progress.set_function(seconds_without)

    def show_run(self, num_steps: int, progress: Progress) -> None:
        """Show figures of the full run, over all lives of the trainer."""
        self._run_steps.set(num_steps)
        self._gap_to_ideal.set(math.nan if progress.gap_to_ideal is None else progress.gap_to_ideal)
        for name in progress.evaluated_sets or (MAIN_SET,):
            first, last = progress.ends_of(name)
            for gauge, value in (
                (self._first_accuracy, first.accuracy),
                (self._heldout_accuracy, last.accuracy),
                (self._heldout_failed, last.num_failed),
            ):
                gauge.labels(set=name).set(math.nan if value is None else value)
        if progress.recent:
            self._last.labels(event="step").set(progress.recent[-1].ended_at)

    def pushed(
        self,
        *,
        num_live: int,
        num_fenced: int,
        seconds: float,
        paused_seconds: float,
        left: Sequence[LeftFor] = (),
    ) -> None:
        """Count the push of a version to all servers; `left`: why servers left parents in it."""
        for reason in left:
            self._left.labels(reason=reason).inc()
        self._last.labels(event="push").set(time.time())
        self._publish_duration.observe(seconds)
        self._pushes.labels(outcome="live").inc(num_live)
        self._pushes.labels(outcome="fenced").inc(num_fenced)
        self.push_exposed.labels(part="generation").inc(paused_seconds)

    def relay_sent(self, num_bytes: int) -> None:
        """Count bytes that the trainer sent to a server."""
        self._relay_sent.inc(num_bytes)

    def checkpoint_written(self, seconds: float) -> None:
        """Show a checkpoint that counts from now on."""
        self._last.labels(event="checkpoint").set(time.time())
        self._checkpoint_duration.observe(seconds)

    def observe_step(self, line: StepLine, staleness: Sequence[int], *, outcome: str) -> None:
        """Show all figures of one step."""
        self._steps.labels(outcome=outcome).inc()
        if outcome == NON_FINITE:
            self._last.labels(event=NON_FINITE).set(line.ended_at)
        self._observe_statistics({"reward_mean": line.reward_mean, **line.statistics})
        self._observe_functions(line.rewards)
        self._observe_sets(line.sets)
        if self._episodes is not None:
            self._episodes.observe(line.statistics)
        for phase, seconds in line.seconds.items():
            self._step_duration.labels(phase=phase).observe(seconds)
        for versions in staleness:
            self._staleness.observe(versions)
        self._staleness_mean.set(line.staleness_mean)
        self._generation.inc(line.generation_seconds)
        self._tokens.inc(line.statistics.get("num_loss_tokens", 0))

    def _observe_statistics(self, statistics: Mapping[str, float]) -> None:
        """What this step has not measured, for want of tokens, is NaN: neither 0 nor the value of an earlier step."""
        for name, gauge in self._statistics.items():
            gauge.set(statistics.get(name, math.nan))
        self._reasons |= {name for name in statistics if name.startswith(MASKED)}
        for name in self._reasons:
            self._masked.labels(reason=name.removeprefix(MASKED)).set(statistics.get(name, math.nan))

    def _observe_sets(self, sets: Mapping[str, Mapping[str, float]]) -> None:
        """A set that the batch lacks has no figures."""
        self._sets |= sets.keys()
        for name in self._sets:
            self._set_prompts.labels(name).inc(sets.get(name, {}).get("num_prompts", 0))
            for figure, gauge in self._set_figures.items():
                gauge.labels(name).set(sets.get(name, {}).get(figure, math.nan))

    def _observe_functions(self, rewards: Mapping[str, Mapping[str, float]]) -> None:
        """Their names are those of the configuration and of its rows; one that the batch lacks has no mean."""
        self._functions |= rewards.keys()
        for name in self._functions:
            self._function_means.labels(name).set(rewards.get(name, {}).get("mean", math.nan))
