"""The figures of a run as short text, the same in the live view, in plain lines and in `penstock status`.

Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.contracts.status import HeldOutFigures, StepFigures, TrainerStatus

UNKNOWN = "-"
NOT_FINITE = "nan"
FROM_TO = " -> "
FAILED = "failed rewards"
NO_SIGNAL = "no signal"
FAULTS = ("reward_failed", "poison")  # reasons why a group is dropped that somebody should look at
DROPPED = {"reward_failed": FAILED, "degenerate": NO_SIGNAL}  # the other reasons are words for people already
SPARKS = "".join(map(chr, range(0x2581, 0x2589)))  # blocks of one eighth to eight eighths
ASCII_SPARKS = "_.-=+*#"


def step_of(status: TrainerStatus) -> str:
    """Such as 12/40."""
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def number(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals, or a dash."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def measure(value: float | None, digits: int = 4) -> str:
    """A figure without natural bounds in at most 8 characters, such as 0.0194 or 1.2e+06."""
    if value is None:
        return UNKNOWN
    return f"{value:z.{digits}f}" if abs(value) < 100 else f"{value:.3g}"  # z: no -0.0000


def share(value: float | None) -> str:
    """A ratio in percent. None rounds to zero but zero."""
    if value is None:
        return UNKNOWN
    return "<1%" if 0 < value < 0.01 else f"{value:.0%}"


def duration(seconds: float | None) -> str:
    """Such as 1:02:03, 4:05 or 0:09."""
    if seconds is None or seconds < 0:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def loss_of(step: StepFigures) -> str:
    """The loss; of a step whose figures are no numbers that they are none."""
    return measure(step.loss) if step.is_finite else NOT_FINITE


def staleness_of(status: TrainerStatus) -> str:
    """The largest of the last step, its mean and the run's largest, such as 0 (mean 0.00; run's maximum 1)."""
    if not status.steps or (last := status.steps[-1]).staleness_max is None:
        return UNKNOWN
    mean = [] if last.staleness_mean is None else [f"mean {last.staleness_mean:.2f}"]
    largest = [] if status.staleness_max is None else [f"run's maximum {status.staleness_max:g}"]
    rest = "; ".join((*mean, *largest))
    return f"{last.staleness_max}{f' ({rest})' if rest else ''}"


def dropped_words(dropped: Mapping[str, int]) -> str:
    """Why tickets ended without training, the most frequent reason first.

    >>> dropped_words({"degenerate": 4, "reward_failed": 12})
    'failed rewards 12, no signal 4'
    """
    ranked = sorted(dropped.items(), key=lambda item: -item[1])
    return ", ".join(f"{DROPPED.get(reason, reason)} {count}" for reason, count in ranked)


def queue_of(status: TrainerStatus) -> str:
    """Groups in each stream."""
    return " ".join(f"{name} {UNKNOWN if depth is None else depth}" for name, depth in status.queue.items()) or UNKNOWN


def counted(num_prompts: int | None, num_failed: int | None) -> str:
    """Behind a figure of held-out prompts: of how many it is, if the reward of some failed; else nothing.

    >>> f"0.95{counted(20, 1)}", f"0.95{counted(20, 0)}"
    ('0.95 (of 19; 1 failed)', '0.95')
    """
    if not num_failed:
        return ""
    num_scored = (num_prompts or 0) - num_failed
    return f" (of {num_scored}; {num_failed} failed)" if num_scored else f" (all {num_failed} failed)"


def heldout_figure(summary: Mapping[str, Any], name: str, when: str) -> str:
    """Of a summary, `accuracy` or `reward` of the held-out prompts at its start or end, and of how many if not all."""
    failed = counted(summary.get("heldout_prompts"), summary.get(f"heldout_failed_{when}"))
    return number(summary.get(f"heldout_{name}_{when}")) + failed


def held_out_sets(status: TrainerStatus) -> dict[str, HeldOutFigures]:
    """By name, each set with an evaluation; the main one first, whose name is empty.

    >>> list(held_out_sets(TrainerStatus(heldout_steps=4, heldout_sets={"hard": HeldOutFigures(steps=4)})))
    ['', 'hard']
    """
    values = {name: getattr(status, f"heldout_{name}") for name in HeldOutFigures.__struct_fields__}
    main = {"": HeldOutFigures(**values)} if status.heldout_steps is not None else {}
    return main | {name: each for name, each in status.heldout_sets.items() if each.steps is not None}


def heldout_of(each: HeldOutFigures) -> list[tuple[str, str]]:
    """Accuracy and mean reward of a held-out set, of the first evaluation and, if that is another, the last.

    Where both figures are equal, as with rewards of 0 and 1, the accuracy alone. The accuracy says of how many prompts
    it is, if some have no reward.
    """
    evaluations = [(each.accuracy, each.reward, counted(each.prompts, each.failed))]
    if each.steps_start not in (None, each.steps):
        first = (each.accuracy_start, each.reward_start, counted(each.prompts_start, each.failed_start))
        evaluations.insert(0, first)
    accuracies = [number(accuracy) for accuracy, _, _ in evaluations]
    rewards = [number(reward) for _, reward, _ in evaluations]
    notes = [note for _, _, note in evaluations]
    shown = [("accuracy", FROM_TO.join(f"{one}{note}" for one, note in zip(accuracies, notes, strict=True)))]
    if rewards != accuracies and any(reward != UNKNOWN for reward in rewards):
        shown.append(("reward", FROM_TO.join(rewards)))
    return shown


def heldout_steps_of(each: HeldOutFigures) -> str:
    """After how many steps the evaluations of `heldout_of` were."""
    steps = dict.fromkeys((each.steps_start, each.steps))
    return FROM_TO.join(str(one) for one in steps if one is not None) + " steps"


def heldout_words(each: HeldOutFigures) -> str:
    """The figures of `heldout_of` in a line."""
    return ", ".join(f"{name} {value}" for name, value in heldout_of(each))


def heldout_name(name: str) -> str:
    """What the figures of a set are called; the name of the main one is empty."""
    return f"held-out {name}".rstrip()


def learning_of(status: TrainerStatus) -> list[tuple[str, str]]:
    """What tells whether the policy learns, of the last step."""
    step = status.steps[-1] if status.steps else StepFigures(0)
    rate = UNKNOWN if step.learning_rate is None else f"{step.learning_rate:.2g}"
    return [
        ("loss", loss_of(step)),
        (f"KL to {status.kl_of}" if status.kl_of else "KL", measure(step.kl)),
        ("entropy", number(step.entropy, 3)),
        ("length", number(step.length, 1)),
        ("learning rate", rate),
    ]


def health_of(status: TrainerStatus) -> list[tuple[str, str]]:
    """What tells whether the steps are worth their time."""
    step = status.steps[-1] if status.steps else StepFigures(0)
    allowed = "" if status.max_staleness is None else f", allowed {status.max_staleness}"
    return [
        (FAILED, share(step.failed_ratio)),
        ("groups without a signal", share(step.no_signal_ratio)),
        ("staleness", staleness_of(status) + allowed),
        ("gap to ideal", number(status.gap_to_ideal)),
    ]


def _held_out(status: TrainerStatus) -> list[tuple[str, str]]:
    sets = held_out_sets(status)
    shown = [(heldout_name(name), f"{heldout_words(one)}, after {heldout_steps_of(one)}") for name, one in sets.items()]
    return shown or [("held-out", UNKNOWN)]


def figures(status: TrainerStatus) -> list[tuple[str, str]]:
    """Name and value of every figure of the trainer, for `penstock status`."""
    return [
        ("step", step_of(status)),
        ("reward", number(status.reward_mean, 3)),
        *_held_out(status),
        *learning_of(status),
        *health_of(status),
        ("dropped groups", dropped_words(status.dropped) or "none"),
        ("version", UNKNOWN if status.policy_version is None else str(status.policy_version)),
        ("queue", queue_of(status)),
        ("tokens/s, last steps", number(status.tokens_per_second, 0)),
        ("seconds/step, last steps", number(status.step_seconds)),
        ("time left", duration(status.eta_seconds)),
    ]


def sparkline(values: Sequence[float], width: int, marks: str = SPARKS) -> str:
    """The last values as a line of marks, the least of them the lowest one.

    >>> sparkline([0.0, 0.5, 1.0], 10, "_-^")
    '_-^'
    """
    shown = values[-width:] if width > 0 else []
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    top = len(marks) - 1
    return "".join(marks[round((value - low) / (high - low) * top) if high > low else 0] for value in shown)
