"""The dashboard of the queue between the services: tickets, streams, memory, dead letters, and the rewards."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import Figure, Graph, Query, make_dashboard, quantile, rate, value
from deploy.grafana.source import RUN

SCORE = "penstock_reward_score_duration_seconds"
VALUE = "penstock_reward_value"

FIGURES = (
    Figure(
        "Outstanding tickets",
        "Issued and not resolved; at most (staleness.max_staleness + 1) * data.batch_size.",
        "none",
        Query(value("penstock_tickets_outstanding")),
        decimals=0,
    ),
    Figure(
        "Oldest waiting ticket",
        "How long the ticket that the next batch waits for first has been waiting.",
        "s",
        Query(value("penstock_tickets_oldest_waiting_seconds")),
        decimals=0,
    ),
    Figure(
        "Queue memory",
        "Memory that the queue's server uses, of what it may use (maxmemory, else the memory of its host).",
        "percentunit",
        Query(f"run:penstock_queue_memory:ratio{{{RUN}}}"),
        limits=(0.6, 0.8),
        decimals=1,
    ),
    Figure(
        "Dead letters",
        "Messages that no service could use; `penstock dead list` shows them.",
        "none",
        Query(value("penstock_queue_groups", labels='stream="dead"')),
        limits=(1, 10),
        decimals=0,
    ),
    Figure(
        "Reward failures",
        "Failed calls of reward functions per call, repeated ones included, over the last 5 minutes.",
        "percentunit",
        Query(f"run:penstock_reward_failures:ratio5m{{{RUN}}}"),
        limits=(0.01, 0.05),
        decimals=1,
    ),
    Figure(
        "Reward workers",
        "Processes that can run a reward function, over all reward services.",
        "none",
        Query(value("penstock_reward_workers_ready", how="sum")),
        limits=(1, 0.5),
        decimals=0,
    ),
)

GRAPHS = (
    Graph(
        "Groups in the streams",
        "Those that a service holds included. tickets -> rollouts -> scored; eval: evaluation tickets.",
        "none",
        (Query(value("penstock_queue_groups", "run, stream", 'stream!="dead"'), "{{stream}}"),),
        stacked=True,
    ),
    Graph(
        "Oldest group of a stream",
        "Rising without end: the service that takes from this stream has stopped.",
        "s",
        (Query(value("penstock_queue_oldest_age_seconds", "run, stream"), "{{stream}}"),),
    ),
    Graph(
        "Tickets by outcome",
        "Tickets per second. issued = trained + dropped + outstanding; reissued is work done twice.",
        "cps",
        (Query(rate("penstock_tickets_total", "run, state, reason"), "{{state}} {{reason}}"),),
    ),
    Graph(
        "Memory of the queue",
        "Used, and the limit. A full queue refuses groups, and all services wait.",
        "bytes",
        (
            Query(value("penstock_queue_memory_used_bytes"), "used"),
            Query(value("penstock_queue_memory_limit_bytes"), "limit"),
        ),
    ),
    Graph(
        "Dead letters and duplicates",
        "New ones within the window: messages that could not be used, by reason, and groups that arrived twice.",
        "none",
        (
            Query(f"sum by (run, reason) (increase(penstock_dead_letters_total{{{RUN}}}[$window]))", "{{reason}}"),
            Query(f"sum by (run) (increase(penstock_duplicate_groups_total{{{RUN}}}[$window]))", "duplicates"),
        ),
    ),
    Graph(
        "Value of rewards",
        "Median and tenths of the scores of training completions, from a histogram; failed ones have none.",
        "none",
        (
            Query(quantile(0.1, VALUE), "10 %"),
            Query(quantile(0.5, VALUE), "median"),
            Query(quantile(0.9, VALUE), "90 %"),
        ),
        least=None,
    ),
    Graph(
        "Duration of reward calls",
        "By function. Near reward.timeout_seconds calls fail.",
        "s",
        (
            Query(quantile(0.5, SCORE, "run, function"), "{{function}} median"),
            Query(quantile(0.95, SCORE, "run, function"), "{{function}} 95 %"),
        ),
    ),
    Graph(
        "Reward calls",
        "Calls per second by function, failed ones included.",
        "cps",
        (Query(rate(f"{SCORE}_count", "run, function"), "{{function}}"),),
    ),
    Graph(
        "Failed reward calls",
        "Per second, by reason, each attempt counted. A failed reward is masked, never a reward of 0.",
        "cps",
        (Query(rate("penstock_reward_failures_total", "run, reason"), "{{reason}}"),),
        stacked=True,
    ),
    Graph(
        "Circuit breakers",
        "1 while calls of a function are kept back because many in a row failed, and groups that are parked meanwhile.",
        "none",
        (
            Query(value("penstock_reward_breaker_open", "run, function"), "{{function}} open"),
            Query(value("penstock_reward_groups_parked", how="sum"), "parked groups"),
        ),
    ),
)


def queue() -> Dashboard:
    """The dashboard."""
    text = "Tickets and streams between the services, the queue's memory, dead letters, and the reward functions."
    return make_dashboard("queue", "Queue and rewards", text, (*FIGURES, *GRAPHS))
