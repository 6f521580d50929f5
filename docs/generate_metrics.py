"""docs/metrics.md, from the metrics that the services export."""

from prometheus_client import CollectorRegistry

from penstock_agent.metrics import AgentMetrics
from penstock_reward.metrics import RewardMetrics
from penstock_rollout.metrics import RolloutMetrics
from penstock_trainer.telemetry.metrics import TrainerMetrics

INTRODUCTION = """# Metrics

<!-- Written by docs/generate_metrics.py from the services' metrics modules; `make docs` writes it again. -->

Every service answers `GET /metrics` in Prometheus' text format, without a token. Names begin with `penstock_`; units
are seconds, bytes, tokens, nats, and ratios from 0 to 1. A counter's samples end in `_total`; a histogram has
`_bucket`, `_sum` and `_count`. No label is the id of a ticket, a group or a process. A figure that is not known yet,
such as the accuracy before the first evaluation, is NaN and never 0.

`job` (trainer, rollout, agent or reward) and `run` (the name of the run) come from Prometheus' side: from the file in
which the trainer lists the services ([dashboards.md](dashboards.md)). Panels and rules add up over the servers of a
run, and never mix two runs.

Three figures to read first:

* **gap to ideal**: step time over the longer of generation and training time, minus 1. 0 means that the longer of the
  two runs all the time and hides the other. Generation time: seconds in which at least one training request ran.
  Training time: forward, backward and optimizer.
* **idle**: seconds in which the trainer waited for a batch or for a push; on the rollout side, seconds in which no
  training request ran. The side that is idle is not the bottleneck.
* **exposed push time**: seconds in which training waited for new weights, plus seconds in which generation was paused
  for them ([weights.md](weights.md)).

Phases of `penstock_trainer_step_duration_seconds`, in order: `wait` (for the batch), `update`, `push_wait` (until the
weights of the step before are staged), and `commit` (until this step is written and in the ledger, which begins beside
the update). `step` is the sum. Inside `update`: `pack` (advantages and packing), `forward_backward`, `optimizer`. In
parallel: `stage` and `push` the weights of the step before, and `push_paused`, for which generation stood still.
`push_exposed` is `push_wait` plus `push_paused`. With `trainer.take_turns` there is also `take_turn` before `update`
(until no engine uses the GPU and the models are on it) and, after it, `leave` (until they are in host memory).

[dashboards.md](dashboards.md) explains how to scrape and show them, [alerts.md](alerts.md) what to do when an alert
fires.
"""


def table(registry: CollectorRegistry) -> list[str]:
    """One row per metric, by name; those of the process come last, in one row."""
    rows = []
    for family in sorted(registry.collect(), key=lambda each: each.name):
        if not family.name.startswith("penstock_"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in labels_of(registry, family.name))
        text = family.documentation.rstrip(".").replace("|", "\\|")
        rows.append(f"| `{name}` | {family.type} | {labels} | {text} |")
    head = ["| Metric | Type | Labels | Meaning |", "| --- | --- | --- | --- |"]
    return [*head, *rows, "| `process_*` | | | memory, CPU seconds, open files and start of the process |"]


def labels_of(registry: CollectorRegistry, name: str) -> tuple[str, ...]:
    """Declared labels: a family without a sample yet has them too."""
    collectors = registry._names_to_collectors
    found: tuple[str, ...] = getattr(collectors.get(name), "_labelnames", ())
    return found


def document() -> str:
    """The full page."""
    registries = {
        "Trainer": TrainerMetrics().registry,
        "Rollout service": RolloutMetrics().registry,
        "Agent service": AgentMetrics().registry,
        "Reward service": RewardMetrics().registry,
    }
    parts = [f"## {title}\n\n" + "\n".join(table(registry)) + "\n" for title, registry in registries.items()]
    return "\n".join([INTRODUCTION, *parts])
