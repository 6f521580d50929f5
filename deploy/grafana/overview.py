"""The dashboard to open first. Its rows answer the questions in the order in which a person asks them."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import TOKENS, Figure, Graph, Heading, Query, Table, make_dashboard, rate, value
from deploy.grafana.source import RUN

STEP = "penstock_trainer_step_duration_seconds"
TOP_PHASES = 'phase=~"wait|commit|update|push_wait|take_turn"'
STARTED = f"process_start_time_seconds{{{RUN}}}"
LIVES = (
    f"sum by (job) (changes({STARTED}[1h])) + count by (job) (last_over_time({STARTED}[1h]))"
    f" - (count by (job) ({STARTED}) or 0 * count by (job) (last_over_time({STARTED}[1h])))"
)
KINDS = f'label_replace(penstock_services{{{RUN}}}, "job", "$1", "kind", "(.+)")'
ANSWERING = f"sum by (job) (up{{{RUN}}}) or 0 * sum by (job) ({KINDS})"  # one that is gone is no target any more
FIRING = (
    "max by (severity, alertname, job, kind, function, instance) ("
    f'(time() - ALERTS_FOR_STATE{{{RUN}}}) * ignoring (alertstate) ALERTS{{{RUN}, alertstate="firing"}})'
)


def _trainer(name: str, legend: str) -> Query:
    return Query(value(f"penstock_trainer_{name}"), legend)


def _share(title: str, description: str, query: Query, limits: tuple[float, float], details: str) -> Figure:
    return Figure(title, description, "percentunit", query, width=6, limits=limits, decimals=1, details=details)


def _since(event: str) -> Query:
    """Also if the trainer was restarted since then, within a day."""
    moments = f'penstock_trainer_last_event_timestamp_seconds{{{RUN}, event="{event}"}}'
    return Query(f"time() - max by (run) (max_over_time({moments}[1d]))")


MAIN = 'set="main"'  # of the set data.eval

LEARNING = (
    Heading("Is it learning?"),
    Figure(
        "Reward",
        "Mean reward of the last batch; completions whose reward failed are left out.",
        "none",
        _trainer("reward_mean", "reward"),
        decimals=3,
        details="trainer",
    ),
    Figure(
        "Held-out accuracy",
        "Share of the prompts of data.eval answered right at the last evaluation (eval.success).",
        "percentunit",
        Query(value("penstock_eval_accuracy_ratio", labels=MAIN)),
        decimals=1,
    ),
    Figure(
        "Held-out, since the start",
        "Held-out accuracy now minus that of the first evaluation. 0 for long: the run learns nothing, or only what "
        "its training prompts share.",
        "percentunit",
        Query(
            f"{value('penstock_eval_accuracy_ratio', labels=MAIN)} - "
            f"{value('penstock_eval_first_accuracy_ratio', labels=MAIN)}"
        ),
        limits=(0.0, -0.02),
        decimals=1,
    ),
    Figure(
        "KL from the reference",
        "Nats per token between the policy and the model that the run began with. 0 if kl_ctl is 0: then there is no "
        "reference.",
        "none",
        _trainer("reference_kl", "KL"),
        decimals=4,
        details="trainer",
    ),
    Figure(
        "Entropy",
        "Mean entropy of the policy at trained tokens, in nats. Near 0: the completions of a prompt are alike, and "
        "groups have no advantage.",
        "none",
        _trainer("entropy", "entropy"),
        decimals=3,
        details="trainer",
    ),
    Figure(
        "Steps done",
        "Steps trained, over those planned. Tickets that are dropped make the run shorter.",
        "percentunit",
        Query(f"{value('penstock_trainer_run_steps')} / {value('penstock_trainer_run_steps_planned')}"),
        decimals=0,
    ),
    Graph(
        "Reward of a batch",
        "The curve that the run is for, and the unweighted mean of each reward function. A function that falls while "
        "the sum rises is being traded for another.",
        "none",
        (
            _trainer("reward_mean", "reward"),
            Query(value("penstock_trainer_reward_function_mean", "run, function"), "{{function}}"),
        ),
        least=None,
        details="trainer",
    ),
    Graph(
        "Accuracy on held-out prompts",
        "Of each set, at each evaluation and at the first one. Flat while the reward rises: the run learns its prompts "
        "by heart, or how to please the reward function.",
        "percentunit",
        (
            Query(value("penstock_eval_accuracy_ratio", "run, set"), "{{set}} now"),
            Query(value("penstock_eval_first_accuracy_ratio", "run, set"), "{{set}} at the start"),
        ),
    ),
    Graph(
        "Loss",
        "Of the last step. With normalised advantages it says little: read reward and gradient instead.",
        "none",
        (_trainer("loss", "loss"),),
        width=8,
        least=None,
        details="trainer",
    ),
    Graph(
        "KL divergence",
        "Nats per token. From the reference it grows as the policy moves. From the sampler it stays near 0; if it "
        "jumps at staleness 0, trainer and engine disagree.",
        "none",
        (_trainer("reference_kl", "from the reference"), _trainer("behaviour_kl", "from the sampler")),
        width=8,
        least=None,
        pushes=True,
        details="trainer",
    ),
    Graph(
        "Entropy of the policy",
        "In nats, at trained tokens. A slow fall is normal; a fall to 0 with a flat reward is a collapse.",
        "none",
        (_trainer("entropy", "entropy"),),
        width=8,
        details="trainer",
    ),
    Graph(
        "Length of completions",
        "Mean tokens of all completions of the batch and of those with an advantage. Growing without reward: the model "
        "rambles (loss.overlong, loss.aggregation).",
        "none",
        (_trainer("length_generated", "generated"), _trainer("length_trained", "trained")),
        width=8,
        details="trainer",
    ),
    Graph(
        "Learning rate",
        "Of the last step, by optimizer.schedule.",
        "sci",
        (_trainer("learning_rate", "learning rate"),),
        width=8,
    ),
    Graph(
        "Gradient norm",
        "Before clipping. Spikes come with large ratios or a rare reward; 0: no group had an advantage.",
        "none",
        (_trainer("grad_norm", "norm"),),
        width=8,
        details="trainer",
    ),
)

SHARES = (
    Heading("What of each batch is lost?"),
    _share(
        "Failed rewards",
        "Share of the completions of the last batch whose reward failed. They are masked, never scored 0.",
        _trainer("failed_reward_ratio", "failed"),
        (0.01, 0.05),
        "queue",
    ),
    _share(
        "Groups without a signal",
        "Share of the groups of the last batch without an advantage: all their rewards are equal, or fewer than two "
        "are valid. Near 1: prompts are all too easy or all too hard (dynamic_sampling).",
        _trainer("no_signal_ratio", "without a signal"),
        (0.5, 0.9),
        "trainer",
    ),
    _share(
        "Truncated",
        "Share of the completions of the last batch that reached sampling.max_new_tokens, or of episodes that reached "
        "a limit of turns or tokens.",
        _trainer("truncated_ratio", "truncated"),
        (0.1, 0.5),
        "trainer",
    ),
    _share(
        "Masked as stale",
        "Share of the tokens of the last batch that are too old to be trained (staleness.on_stale: mask).",
        Query(value("penstock_trainer_masked_ratio", labels='reason="stale"'), "masked"),
        (0.05, 0.25),
        "trainer",
    ),
)

ALIVE = (
    Heading("Is it alive?"),
    Table(
        "Firing alerts",
        "Of this run, with the time since each condition began. docs/alerts.md says for each what it means and what to "
        "do.",
        "s",
        Query(FIRING, "{{alertname}}"),
        columns={
            "severity": "Severity",
            "alertname": "Alert",
            "Value": "For",
            "job": "Service",
            "kind": "Kind",
            "function": "Reward function",
            "instance": "Address",
        },
        empty="No alert fires",
    ),
    Figure(
        "Since the last step",
        "Red at an hour, as PenstockNoStep. Compare it with the step time.",
        "s",
        _since("step"),
        limits=(600, 3600),
        decimals=0,
        details="trainer",
    ),
    Figure(
        "Services that answer",
        "Of each kind, as Prometheus sees them. 0: none, and the run waits for one.",
        "none",
        Query(ANSWERING, "{{job}}"),
        width=8,
        limits=(1, 0.5),
        decimals=0,
        details="rollout",
    ),
    Figure(
        "Ended or restarted",
        "Processes of each kind of service that ended or were started again within the last hour.",
        "none",
        Query(LIVES, "{{job}}"),
        width=8,
        limits=(1, 3),
        decimals=0,
    ),
    Figure(
        "Since the last checkpoint",
        "A restart begins there, and trains the steps since then again from their files.",
        "s",
        _since("checkpoint"),
        decimals=0,
        details="trainer",
    ),
    Graph(
        "Staleness",
        "Versions between generation and training: mean of the last batch, and the bound (staleness.max_staleness).",
        "none",
        (
            _trainer("staleness_mean_versions", "mean"),
            _trainer("staleness_limit_versions", "bound"),
        ),
        width=8,
        details="trainer",
    ),
    Graph(
        "Queue",
        "Groups in each stream, those that a service holds included. Tickets pile up before busy servers, rollouts "
        "before slow rewards, scored groups before a busy trainer.",
        "none",
        (Query(value("penstock_queue_groups", "run, stream"), "{{stream}}"),),
        width=8,
        stacked=True,
        details="queue",
    ),
    Graph(
        "Versions",
        "Of the trainer's weights, and of those that each server serves; -1 before any. They rise together.",
        "none",
        (
            _trainer("policy_version", "trainer"),
            Query(value("penstock_rollout_policy_version", "run, instance"), "{{instance}}"),
        ),
        width=8,
        pushes=True,
        details="rollout",
    ),
)

SPEED = (
    Heading("Is it fast?"),
    Figure(
        "Gap to ideal",
        "Step time over the longer of generation and training time, minus 1, over the last 10 steps. 0: the longer of "
        "the two runs all the time and hides the other.",
        "percentunit",
        _trainer("gap_to_ideal_ratio", "gap"),
        width=6,
        limits=(0.25, 1),
        decimals=0,
        details="trainer",
    ),
    Figure(
        "Generated tokens",
        "Tokens that all rollout servers sample, per second, over the last 5 minutes.",
        TOKENS,
        Query(f"run:penstock_generated_tokens:rate5m{{{RUN}}}"),
        width=6,
        decimals=0,
        details="rollout",
    ),
    Figure(
        "Trainer idle",
        "Share of the time in which the trainer waits for a batch or a push. High: generation is the bottleneck.",
        "percentunit",
        Query(f"run:penstock_trainer_idle:ratio5m{{{RUN}}}"),
        width=6,
        decimals=0,
        details="trainer",
    ),
    Figure(
        "Servers idle",
        "Share of the time in which a server runs no training request. High: the trainer is the bottleneck.",
        "percentunit",
        Query(f"run:penstock_rollout_idle:ratio5m{{{RUN}}}"),
        width=6,
        decimals=0,
        details="rollout",
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
                "{{phase}}",
            ),
        ),
        width=8,
        stacked=True,
        details="trainer",
    ),
    Graph(
        "Gap to ideal over time",
        "Rising: the trainer waits for groups while the servers wait for tickets or weights.",
        "percentunit",
        (
            _trainer("gap_to_ideal_ratio", "last 10 steps"),
            Query(f"run:penstock_gap_to_ideal:ratio15m{{{RUN}}}", "15 minutes"),
        ),
        width=8,
        details="trainer",
    ),
    Graph(
        "Idle and exposed push time",
        "Share of the time in which the trainer waits, in which servers run no training request, and that pushes cost. "
        "The side that is idle is not the bottleneck.",
        "percentunit",
        (
            Query(f"run:penstock_trainer_idle:ratio5m{{{RUN}}}", "trainer idle"),
            Query(f"run:penstock_rollout_idle:ratio5m{{{RUN}}}", "servers idle"),
            Query(f"run:penstock_exposed_push:ratio5m{{{RUN}}}", "exposed push"),
        ),
        width=8,
        details="rollout",
    ),
)


def overview() -> Dashboard:
    """The dashboard."""
    text = "Is the run learning, what of each batch is lost, is it alive, and is it fast."
    return make_dashboard("overview", "Overview", text, (*LEARNING, *SHARES, *ALIVE, *SPEED))
