"""The dashboard of the agent services: episodes, their calls of the model, what they wait for."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import TOKENS, Figure, Graph, Query, make_dashboard, quantile, rate, value
from deploy.grafana.source import RUN

EPISODE = "penstock_agent_episode_duration_seconds"
CALL = "penstock_agent_call_duration_seconds"
TURNS = "penstock_agent_turns"
TOKENS_TOTAL = "penstock_agent_tokens_total"
CACHED, SENT = (rate(TOKENS_TOTAL, labels=f'kind="{kind}"') for kind in ("cached", "sent"))

FIGURES = (
    Figure(
        "Agent services",
        "Services with a live heartbeat. None: this run makes no episodes, or they are down.",
        "none",
        Query(value("penstock_services", labels='kind="agent"')),
        decimals=0,
        limits=(1, 0.5),
    ),
    Figure(
        "Running episodes",
        "Attempts at episodes that run now; at most agent.sessions on each service.",
        "none",
        Query(value("penstock_agent_sessions_running", how="sum")),
        decimals=0,
    ),
    Figure(
        "Failed attempts",
        "Share of the attempts that end without a score, over the last 10 minutes. They are repeated up to "
        "agent.max_attempts times, and then masked.",
        "percentunit",
        Query(f"run:penstock_agent_failures:ratio10m{{{RUN}}}"),
        limits=(0.02, 0.1),
        decimals=1,
    ),
    Figure(
        "Cached prompt tokens",
        "Of the tokens that calls send to rollout servers, the share that the server had in its cache. Low in episodes "
        "of many turns: they move between servers, or caches are too small.",
        "percentunit",
        Query(f"{CACHED} / {SENT}"),
        decimals=0,
    ),
    Figure(
        "Waiting calls",
        "Calls of the model for which no server can be asked now: all are full, fenced or gone.",
        "none",
        Query(value("penstock_agent_calls_waiting", how="sum")),
        decimals=0,
    ),
    Figure(
        "Breaker of the environment",
        "1 while the environment fails, so that one episode at a time tries whether it works again.",
        "none",
        Query(value("penstock_agent_breaker_open")),
        limits=(0.5, 1),
        decimals=0,
    ),
)

GRAPHS = (
    Graph(
        "Episodes by end",
        "Episodes per second. done: by its environment or agent; max_turns, max_tokens: cut; timeout, failure: no "
        "score, unless agent.on_timeout is score.",
        "cps",
        (Query(rate("penstock_agent_episodes_total", "run, end"), "{{end}}"),),
        stacked=True,
    ),
    Graph(
        "Attempts and failures",
        "Attempts at episodes per second, and those without a score. Each counts, also if a later one succeeds.",
        "cps",
        (
            Query(rate("penstock_agent_attempts_total"), "attempts"),
            Query(rate("penstock_agent_failures_total", "run, kind"), "{{kind}}"),
        ),
    ),
    Graph(
        "Duration of an episode",
        "Of one attempt. Near agent.timeout_seconds they are ended.",
        "s",
        (
            Query(quantile(0.5, EPISODE), "median"),
            Query(quantile(0.95, EPISODE), "95 %"),
        ),
    ),
    Graph(
        "What episodes wait for",
        "Running attempts by what they wait for, on average: a call of the model, or the environment and its tools.",
        "none",
        (Query(rate("penstock_agent_waited_seconds_total", "run, waits_for"), "{{waits_for}}"),),
        stacked=True,
    ),
    Graph(
        "Turns of an episode",
        "Calls of the model in episodes with a score. Near agent.max_turns they are cut.",
        "none",
        (
            Query(quantile(0.5, TURNS), "median"),
            Query(quantile(0.95, TURNS), "95 %"),
        ),
    ),
    Graph(
        "Duration of a call of the model",
        "With all waits for a server; own: what the agent service itself computes (rendering, recording, parsing).",
        "s",
        (
            Query(quantile(0.5, CALL), "median"),
            Query(quantile(0.95, CALL), "95 %"),
            Query(quantile(0.95, "penstock_agent_call_own_seconds"), "own 95 %"),
        ),
    ),
    Graph(
        "Tokens of episodes",
        "Per second, of episodes with a score. sampled and context: each once; sent: over all calls; cached: of these, "
        "what servers had in their caches.",
        TOKENS,
        (Query(rate(TOKENS_TOTAL, "run, kind"), "{{kind}}"),),
    ),
    Graph(
        "Branches",
        "Calls per second that could not continue the exact tokens before them, by reason. template: the chat template "
        "renders the history otherwise; edited, compacted: the agent changed it; subagent, sibling: it began another.",
        "cps",
        (Query(rate("penstock_agent_branches_total", "run, reason"), "{{reason}}"),),
        stacked=True,
    ),
    Graph(
        "Tool calls",
        "Per second, and those that could not be parsed or that a tool refused.",
        "cps",
        (
            Query(rate("penstock_agent_tool_calls_total"), "asked for"),
            Query(rate("penstock_agent_tool_calls_failed_total"), "failed"),
        ),
    ),
    Graph(
        "Calls asked again",
        "Per second, by reason: a server was busy, failed, unreachable or gone, or its answer was malformed.",
        "cps",
        (Query(rate("penstock_agent_calls_asked_again_total", "run, reason"), "{{reason}}"),),
        stacked=True,
    ),
    Graph(
        "Requests of agents",
        "Per second: refused ones by their error, and repetitions of a known request, which get the same answer.",
        "cps",
        (
            Query(rate("penstock_agent_requests_refused_total", "run, code"), "{{code}}"),
            Query(rate("penstock_agent_requests_repeated_total"), "repeated"),
        ),
    ),
    Graph(
        "Tickets and kept episodes",
        "Tickets per second by what became of them, and episodes that an earlier holder of their ticket had finished, "
        "so that they were not run again.",
        "cps",
        (
            Query(rate("penstock_agent_groups_total", "run, outcome"), "{{outcome}}"),
            Query(rate("penstock_agent_episodes_kept_total"), "kept episodes"),
        ),
    ),
    Graph(
        "Length of a trained episode",
        "Mean tokens of the episodes of the last batch: those that the model sampled, and those that it only read, "
        "each once.",
        "none",
        (
            Query(value("penstock_trainer_episode_sampled_tokens"), "sampled"),
            Query(value("penstock_trainer_episode_context_tokens"), "context"),
        ),
    ),
    Graph(
        "Versions within an episode",
        "Newest minus oldest version that sampled an episode of the last batch. Large: episodes last for steps.",
        "none",
        (
            Query(value("penstock_trainer_episode_version_spread"), "mean"),
            Query(value("penstock_trainer_episode_version_spread_max"), "largest"),
        ),
        pushes=True,
    ),
)


def agent() -> Dashboard:
    """The dashboard."""
    text = "Episodes: how they end and fail, what they wait for, their tokens, branches and tool calls."
    return make_dashboard("agent", "Episodes", text, (*FIGURES, *GRAPHS))
