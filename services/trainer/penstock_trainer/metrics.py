"""The trainer's Prometheus metrics, on their own registry.

Owns names and types (docs/architecture.md lists them); set by the loop and the consumer.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from penstock_trainer.progress import StepLine

MASKED = "masked_"
# What can become of a ticket, and why; each counts from 0, so that a rate of it is known before its first.
TICKET_STATES = {
    "issued": ("",),
    "reissued": ("version", "stale", "lost"),
    "trained": ("",),
    "dropped": ("stale", "degenerate", "reward_failed", "poison"),
}
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class TrainerMetrics:
    """All metrics of one trainer."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"penstock_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"penstock_{name}", text, labels, registry=registry)

        self.queue_groups = gauge("queue_groups", "Groups in a stream, held ones included", "stream")
        self.queue_oldest_age = gauge("queue_oldest_age_seconds", "Age of the oldest group of a stream", "stream")
        self.tickets_outstanding = gauge("tickets_outstanding", "Tickets issued and not resolved")
        self.tickets = counter("tickets", "Tickets by what became of them", "state", "reason")
        for state, reasons in TICKET_STATES.items():
            for reason in reasons:
                self.tickets.labels(state=state, reason=reason)
        self.oldest_waiting = gauge(
            "tickets_oldest_waiting_seconds", "How long the ticket that the next batch waits for first has been waiting"
        )
        self.dead_letters = counter("dead_letters", "Messages that could not be used", "reason")
        self.duplicates = counter("duplicate_groups", "Groups that arrived for a ticket already held or resolved")
        self.steps = counter("trainer_steps", "Training steps", "outcome")
        self.policy_version = gauge("trainer_policy_version", "Version of the trainer's weights")
        self.step_duration = Histogram(
            "penstock_trainer_step_duration_seconds",
            "Time of a step by phase",
            ("phase",),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.tokens = counter("trainer_tokens", "Completion tokens trained")
        self.staleness = Histogram(
            "penstock_trainer_staleness_versions",
            "Versions between generation and training, per completion",
            buckets=(0, 1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.masked = gauge("trainer_masked_ratio", "Share of trained tokens left out of the loss", "reason")
        self.statistics = {
            name: gauge(f"trainer_{name}", text)
            for name, text in {
                "reward_mean": "Mean reward of the last batch",
                "loss": "Loss of the last step",
                "grad_norm": "Gradient norm of the last step, before clipping",
                "entropy": "Entropy of the policy at trained tokens, in nats",
                "reference_kl": "KL divergence from the reference policy, in nats",
                "behaviour_kl": "KL divergence from the sampler's log-probabilities, in nats",
                "effective_sample_size_ratio": "Effective sample size of the importance weights, 0 to 1",
                "clipped_ratio": "Share of trained tokens whose surrogate was limited",
                "clipped_ratio_low": "Share of trained tokens limited because their ratio was too low",
                "clipped_ratio_high": "Share of trained tokens limited because their ratio was too high",
                "ratio_min": "Smallest ratio of policy to sampler of a trained token",
                "ratio_mean": "Mean ratio of policy to sampler",
                "ratio_max": "Largest ratio of policy to sampler of a trained token",
                "learning_rate": "Learning rate of the last step",
                "reward_std": "Standard deviation of the rewards of the last batch",
                "reward_min": "Smallest reward of the last batch",
                "reward_max": "Largest reward of the last batch",
                "advantage_std": "Root mean square of the advantages of the last batch",
                "advantage_min": "Smallest advantage of the last batch",
                "advantage_max": "Largest advantage of the last batch",
                "length_generated": "Mean tokens of the completions of the last batch",
                "length_trained": "Mean tokens of the completions with an advantage",
                "length_bias": "length_trained over length_generated: 1 without bias",
            }.items()
        }
        self.idle = counter("trainer_idle_seconds", "Time spent waiting for a batch or for a push")
        self.publish_duration = Histogram(
            "penstock_trainer_weight_publish_duration_seconds",
            "Time to push a version to all servers",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.pushes = counter("trainer_weight_pushes", "Pushes of a version to one server", "outcome")
        for outcome in ("live", "fenced"):
            self.pushes.labels(outcome=outcome)
        self.fenced_servers = gauge("trainer_fenced_servers", "Servers that did not take the last push")
        self.push_exposed = counter(
            "trainer_weight_exposed_seconds",
            "Time that training waited or generation paused for weights",
            "part",
        )
        for part in ("training", "generation"):
            self.push_exposed.labels(part=part)
        self.checkpoint_duration = Histogram(
            "penstock_trainer_checkpoint_duration_seconds",
            "Time to write a checkpoint, beside training",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.checkpoint_exposed = Histogram(
            "penstock_trainer_checkpoint_exposed_seconds",
            "Time that training stood still for a checkpoint's copy",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.heldout_accuracy = gauge("eval_accuracy_ratio", "Share of held-out prompts answered right")
        self.tracking_dropped = counter(
            "trainer_tracking_dropped", "Steps and evaluations that a tracker did not take", "tracker", "reason"
        )
        self.gap_to_ideal = gauge(
            "trainer_gap_to_ideal_ratio", "Step time over the longer of generation and training time, minus 1"
        )

    def observe_step(self, line: StepLine, staleness: Sequence[int], *, outcome: str) -> None:
        """Everything that one step says."""
        self.steps.labels(outcome=outcome).inc()
        self.statistics["reward_mean"].set(line.reward_mean)
        for name, share in line.statistics.items():
            if name.startswith(MASKED):
                self.masked.labels(reason=name.removeprefix(MASKED)).set(share)
        for name, value in line.statistics.items():
            if name in self.statistics:
                self.statistics[name].set(value)
        for phase, seconds in line.seconds.items():
            self.step_duration.labels(phase=phase).observe(seconds)
        for versions in staleness:
            self.staleness.observe(versions)
        self.tokens.inc(line.statistics.get("num_loss_tokens", 0))
