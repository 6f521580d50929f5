"""The dashboard to open first: does the run learn, what limits its speed, does anything wait."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import RUN, TOKENS, Figure, Graph, Query, make_dashboard, rate, value

STEP = "penstock_trainer_step_duration_seconds"
TOP_PHASES = 'phase=~"wait|commit|update|push_wait|take_turn"'

FIGURES = (
    Figure(
        "Gap to ideal",
        "Step time over the longer of generation and training time, minus 1, over the last 10 steps. 0: the longer of "
        "the two runs all the time and hides the other.",
        "percentunit",
        Query(value("penstock_trainer_gap_to_ideal_ratio")),
        limits=(0.25, 1),
        decimals=0,
    ),
    Figure(
        "Reward",
        "Mean reward of the last batch; completions whose reward failed are left out.",
        "none",
        Query(value("penstock_trainer_reward_mean")),
        decimals=3,
    ),
    Figure(
        "Held-out accuracy",
        "Share of the held-out prompts answered right at the last evaluation (eval.success).",
        "percentunit",
        Query(value("penstock_eval_accuracy_ratio")),
        decimals=1,
    ),
    Figure(
        "Steps done",
        "Steps trained, over those planned. Tickets that are dropped make the run shorter.",
        "percentunit",
        Query(f"{value('penstock_trainer_run_steps')} / {value('penstock_trainer_run_steps_planned')}"),
        decimals=0,
    ),
    Figure(
        "Generated tokens",
        "Tokens that all rollout servers sample, per second, over the last 5 minutes.",
        TOKENS,
        Query(f"run:penstock_generated_tokens:rate5m{{{RUN}}}"),
        decimals=0,
    ),
    Figure(
        "Alerts",
        "Alerts of this project that fire now, over all runs; docs/alerts.md explains what to do for each.",
        "none",
        Query('count(ALERTS{alertname=~"Penstock.*", alertstate="firing"}) or vector(0)', "alerts"),
        limits=(1, 2),
        decimals=0,
    ),
)

GRAPHS = (
    Graph(
        "Reward and held-out accuracy",
        "The curve that the run is for: mean reward of each batch, and accuracy on the held-out prompts.",
        "none",
        (
            Query(value("penstock_trainer_reward_mean"), "{{run}} reward"),
            Query(value("penstock_eval_accuracy_ratio"), "{{run}} held-out accuracy"),
        ),
        least=None,
    ),
    Graph(
        "Gap to ideal",
        "0: the longer of generation and training runs all the time. Rising: the trainer waits for groups while the "
        "servers wait for tickets or weights.",
        "percentunit",
        (
            Query(value("penstock_trainer_gap_to_ideal_ratio"), "{{run}} last 10 steps"),
            Query(f"run:penstock_gap_to_ideal:ratio15m{{{RUN}}}", "{{run}} 15 minutes"),
        ),
    ),
    Graph(
        "Step phases",
        "Mean seconds of a step by phase. wait: for the batch, generation being the bottleneck; push_wait: for the "
        "weights of the step before to be staged; update: forward, backward, optimizer; take_turn: for the GPU, if "
        "trainer and engines take turns.",
        "s",
        (
            Query(
                f"{rate(f'{STEP}_sum', 'run, phase', TOP_PHASES)} / on (run) group_left "
                + rate(f"{STEP}_count", labels='phase="step"'),
                "{{run}} {{phase}}",
            ),
        ),
        stacked=True,
    ),
    Graph(
        "Idle and exposed push time",
        "Share of the time in which the trainer waits, in which servers run no training request, and that pushes cost. "
        "The side that is idle is not the bottleneck.",
        "percentunit",
        (
            Query(f"run:penstock_trainer_idle:ratio5m{{{RUN}}}", "{{run}} trainer idle"),
            Query(f"run:penstock_rollout_idle:ratio5m{{{RUN}}}", "{{run}} servers idle"),
            Query(f"run:penstock_exposed_push:ratio5m{{{RUN}}}", "{{run}} exposed push"),
        ),
    ),
    Graph(
        "Staleness",
        "Versions between generation and training: mean of the last batch, and the bound (staleness.max_staleness).",
        "none",
        (
            Query(value("penstock_trainer_staleness_mean_versions"), "{{run}} mean"),
            Query(value("penstock_trainer_staleness_limit_versions"), "{{run}} bound"),
        ),
    ),
    Graph(
        "Queue",
        "Groups in each stream, those that a service holds included. Tickets pile up before busy servers, rollouts "
        "before slow rewards, scored groups before a busy trainer.",
        "none",
        (Query(value("penstock_queue_groups", "run, stream"), "{{run}} {{stream}}"),),
        stacked=True,
    ),
)


def overview() -> Dashboard:
    """The dashboard."""
    text = "Does the run learn, how far is it from its ideal speed, and where does it wait."
    return make_dashboard("overview", "Overview", text, (*FIGURES, *GRAPHS))
