"""The dashboard of the generating side: servers, groups, tokens, weight updates."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import TOKENS, Figure, Graph, Query, make_dashboard, quantile, rate, value
from deploy.grafana.source import RUN

SERVER = "run, instance"
GROUP = "penstock_rollout_group_duration_seconds"
UPDATE = "penstock_rollout_weight_update_duration_seconds"

FIGURES = (
    Figure(
        "Servers",
        "Rollout services with a live heartbeat.",
        "none",
        Query(value("penstock_services", labels='kind="rollout"')),
        decimals=0,
        limits=(1, 0.5),
    ),
    Figure(
        "Fenced servers",
        "Servers that failed a push or a check: they take no ticket until they serve the announced version.",
        "none",
        Query(value("penstock_rollout_servers", labels='state="fenced"')),
        decimals=0,
        limits=(1, 2),
    ),
    Figure(
        "Generated tokens",
        "Tokens that all servers sample, per second, over the last 5 minutes.",
        TOKENS,
        Query(f"run:penstock_generated_tokens:rate5m{{{RUN}}}"),
        decimals=0,
    ),
    Figure(
        "Idle",
        "Share of the time in which a server runs no training request, on average over the servers. High: the trainer "
        "is the bottleneck, or credits are too few (staleness.max_staleness, data.batch_size).",
        "percentunit",
        Query(f"run:penstock_rollout_idle:ratio5m{{{RUN}}}"),
        decimals=0,
    ),
    Figure(
        "Versions behind",
        "The trainer's version minus the oldest version that a server serves. 1 while a push runs.",
        "none",
        Query(f"{value('penstock_trainer_policy_version')} - {value('penstock_rollout_policy_version', how='min')}"),
        decimals=0,
    ),
    Figure(
        "Engine restarts",
        "Inference engines that were restarted within the last hour.",
        "none",
        Query(f"sum by (run) (increase(penstock_rollout_engine_restarts_total{{{RUN}}}[1h]))"),
        decimals=0,
        limits=(1, 3),
    ),
)

GRAPHS = (
    Graph(
        "Tokens per server",
        "Sampled tokens of groups that were handed over, per second.",
        TOKENS,
        (Query(rate("penstock_rollout_completion_tokens_total", SERVER), "{{instance}}"),),
        stacked=True,
        pushes=True,
    ),
    Graph(
        "Running groups",
        "Groups on each engine; it is full at rollout.engine.max_running_requests / actor.group_size.",
        "none",
        (Query(value("penstock_rollout_inflight_groups", SERVER), "{{instance}}"),),
        stacked=True,
    ),
    Graph(
        "Duration of a group",
        "From request to answer. Far apart: a few long completions delay their batch (docs/staleness.md).",
        "s",
        (
            Query(quantile(0.5, GROUP), "median"),
            Query(quantile(0.95, GROUP), "95 %"),
        ),
    ),
    Graph(
        "Groups by outcome",
        "Groups per second by outcome. late and returned are work done twice; the server's log explains engine_died, "
        "rejected and failed.",
        "cps",
        (Query(rate("penstock_rollout_groups_total", "run, outcome"), "{{outcome}}"),),
        stacked=True,
    ),
    Graph(
        "Servers by state",
        "From their records and the results of pushes. waiting: without weights; updating: loads weights.",
        "none",
        (Query(value("penstock_rollout_servers", "run, state"), "{{state}}"),),
        stacked=True,
    ),
    Graph(
        "Policy version",
        "The version that each server serves, and the trainer's own. They rise together.",
        "none",
        (
            Query(value("penstock_rollout_policy_version", SERVER), "{{instance}}"),
            Query(value("penstock_trainer_policy_version"), "trainer"),
        ),
        pushes=True,
    ),
    Graph(
        "Weight updates",
        "From the start of a load on one server until generation continues.",
        "s",
        (
            Query(quantile(0.5, UPDATE, "run, transport"), "{{transport}} median"),
            Query(quantile(0.95, UPDATE, "run, transport"), "{{transport}} 95 %"),
        ),
    ),
    Graph(
        "Generation paused",
        "Share of the time in which each server holds its requests for new weights.",
        "percentunit",
        (Query(rate("penstock_rollout_paused_seconds_total", SERVER), "{{instance}}"),),
        pushes=True,
    ),
    Graph(
        "Weights by the relay",
        "With weights.relay_fan_out: bytes that servers received from the trainer and from each other, and those that "
        "the trainer sent. Its share falls as servers join.",
        "Bps",
        (
            Query(rate("penstock_rollout_relay_received_bytes_total", "run, sender"), "received from {{sender}}"),
            Query(rate("penstock_trainer_relay_sent_bytes_total"), "sent by the trainer"),
        ),
        pushes=True,
    ),
    Graph(
        "Parents left",
        "With weights.relay_fan_out: senders of weights that a server left for the next one, per second, by what they "
        "were. wrong: its bytes did not have the digests; that server is fenced (docs/weights.md).",
        "cps",
        (Query(rate("penstock_rollout_relay_parents_left_total", "run, reason"), "{{reason}}"),),
        pushes=True,
    ),
)


def rollout() -> Dashboard:
    """The dashboard."""
    text = "The work of the rollout servers, and the cost of new weights."
    return make_dashboard("rollout", "Rollout", text, (*FIGURES, *GRAPHS))
