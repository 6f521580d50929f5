"""The dashboard of the learning side: the objective's figures, the step's time, pushes and checkpoints."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import TOKENS, Figure, Graph, Query, make_dashboard, quantile, rate, value
from deploy.grafana.source import RUN

STEP = "penstock_trainer_step_duration_seconds"
PUBLISH = "penstock_trainer_weight_publish_duration_seconds"
PHASE_STEP = 'phase="step"'
WORK = 'phase=~"pack|forward_backward|optimizer|stage|commit"'


def _trainer(name: str, legend: str) -> Query:
    return Query(value(f"penstock_trainer_{name}"), legend)


def _mean(histogram: str) -> str:
    """The mean over a process's full life: checkpoints are too far apart for a window."""
    return f"{value(f'{histogram}_sum', how='sum')} / {value(f'{histogram}_count', how='sum')}"


FIGURES = (
    Figure(
        "Steps",
        "Steps of the run that are trained, over all lives of the trainer.",
        "none",
        Query(value("penstock_trainer_run_steps")),
        decimals=0,
    ),
    Figure(
        "Step time",
        "Mean time from the end of a step to the end of the next.",
        "s",
        Query(f"{rate(f'{STEP}_sum', labels=PHASE_STEP)} / {rate(f'{STEP}_count', labels=PHASE_STEP)}"),
        decimals=2,
    ),
    Figure(
        "Trained tokens",
        "Completion tokens that enter the loss, per second, over the last 5 minutes.",
        TOKENS,
        Query(f"run:penstock_trained_tokens:rate5m{{{RUN}}}"),
        decimals=0,
    ),
    Figure(
        "Idle",
        "Share of the time in which the trainer waits for a batch or a push. High: generation is the bottleneck.",
        "percentunit",
        Query(f"run:penstock_trainer_idle:ratio5m{{{RUN}}}"),
        decimals=0,
    ),
    Figure(
        "Without progress",
        "Time without a step, an arrival, a push or work of the trainer's own. At run.stall_seconds the trainer logs "
        "what it waits for and exits.",
        "s",
        Query(value("penstock_trainer_without_progress_seconds")),
        decimals=0,
    ),
    Figure(
        "Memory",
        "Resident memory of the trainer's process (rank 0).",
        "bytes",
        Query(value("process_resident_memory_bytes", labels='job="trainer"')),
        decimals=1,
    ),
)

GRAPHS = (
    Graph(
        "Reward of a batch",
        "Mean, spread and extremes over the completions of the last batch. A spread of 0 gives no gradient.",
        "none",
        (
            _trainer("reward_mean", "mean"),
            _trainer("reward_std", "standard deviation"),
            _trainer("reward_min", "least"),
            _trainer("reward_max", "greatest"),
        ),
        least=None,
    ),
    Graph(
        "Entropy",
        "Mean entropy of the policy at trained tokens, in nats. Falling towards 0: completions become all alike.",
        "none",
        (_trainer("entropy", "entropy"),),
    ),
    Graph(
        "KL divergence",
        "Nats per token from the sampler's log-probabilities, from the reference, and from a teacher. If the first "
        "jumps at staleness 0, trainer and engine disagree.",
        "none",
        (
            _trainer("behaviour_kl", "from the sampler"),
            _trainer("reference_kl", "from the reference"),
            _trainer("teacher_kl", "from the teacher"),
        ),
        least=None,
        pushes=True,
    ),
    Graph(
        "Trust region",
        "Share of the trained tokens whose surrogate was clipped, and effective sample size of the importance weights "
        "(1: on-policy).",
        "percentunit",
        (
            _trainer("clipped_ratio_low", "clipped, ratio too low"),
            _trainer("clipped_ratio_high", "clipped, ratio too high"),
            _trainer("effective_sample_size_ratio", "effective sample size"),
        ),
    ),
    Graph(
        "Loss",
        "Loss of the last step. With normalised advantages it says little: read reward and gradient instead.",
        "none",
        (_trainer("loss", "loss"),),
        least=None,
    ),
    Graph(
        "Gradient norm",
        "Before clipping. Spikes come with large ratios or a rare reward; steps that are not finite change no weights.",
        "none",
        (_trainer("grad_norm", "norm"),),
    ),
    Graph(
        "Length of completions",
        "Mean tokens of all completions of the batch and of those with an advantage.",
        "none",
        (_trainer("length_generated", "generated"), _trainer("length_trained", "trained")),
    ),
    Graph(
        "Tokens left out of the loss",
        "Share of the trained tokens that were masked, by reason.",
        "percentunit",
        (Query(value("penstock_trainer_masked_ratio", "run, reason"), "{{reason}}"),),
    ),
    Graph(
        "Work of a step",
        "Mean seconds of a step in which the trainer works, by phase; stage runs in parallel.",
        "s",
        (
            Query(
                f"{rate(f'{STEP}_sum', 'run, phase', WORK)} / on (run) group_left "
                + rate(f"{STEP}_count", labels=PHASE_STEP),
                "{{phase}}",
            ),
        ),
        stacked=True,
    ),
    Graph(
        "Pushes",
        "Time to push a version to all servers, during training; push_wait in the overview is the wait of training.",
        "s",
        (Query(quantile(0.5, PUBLISH), "median"), Query(quantile(0.95, PUBLISH), "95 %")),
    ),
    Graph(
        "Checkpoints",
        "Mean time to write one, during training, and the part for which training stops, since the trainer started.",
        "s",
        (
            Query(_mean("penstock_trainer_checkpoint_duration_seconds"), "writing"),
            Query(_mean("penstock_trainer_checkpoint_exposed_seconds"), "standing still"),
        ),
    ),
    Graph(
        "Steps by outcome",
        "Steps per second. unchanged: no completion had a gradient; non_finite: loss or gradient was not a number.",
        "cps",
        (Query(rate("penstock_trainer_steps_total", "run, outcome"), "{{outcome}}"),),
        stacked=True,
    ),
)


def trainer() -> Dashboard:
    """The dashboard."""
    text = "The training signal, the distance that the policy moves, and the phases of a step."
    return make_dashboard("trainer", "Trainer", text, (*FIGURES, *GRAPHS))
