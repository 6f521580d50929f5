"""The figures of a run as short text, the same in the table, in plain lines and in `penstock status`.

Pure.
"""

from penstock.contracts.status import TrainerStatus

UNKNOWN = "-"


def step_of(status: TrainerStatus) -> str:
    """Such as 12/40."""
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def number(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals, or a dash."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Such as 1:02:03, 4:05 or 0:09."""
    if seconds is None or seconds < 0:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def staleness_of(status: TrainerStatus) -> str:
    """The largest staleness trained so far, and the mean."""
    if status.staleness_max is None:
        return UNKNOWN
    mean = "" if status.staleness_mean is None else f" (mean {status.staleness_mean:.2f})"
    return f"{status.staleness_max:g}{mean}"


def queue_of(status: TrainerStatus) -> str:
    """Groups in each stream."""
    return " ".join(f"{name} {UNKNOWN if depth is None else depth}" for name, depth in status.queue.items()) or UNKNOWN


def figures(status: TrainerStatus) -> list[tuple[str, str]]:
    """Name and value of every figure of the trainer in the view."""
    return [
        ("step", step_of(status)),
        ("reward", number(status.reward_mean)),
        ("held-out accuracy", number(status.heldout_accuracy)),
        ("version", UNKNOWN if status.policy_version is None else str(status.policy_version)),
        ("staleness", staleness_of(status)),
        ("queue", queue_of(status)),
        ("tokens/s", number(status.tokens_per_second, 0)),
        ("gap to ideal", number(status.gap_to_ideal)),
        ("seconds/step", number(status.step_seconds)),
        ("ETA", duration(status.eta_seconds)),
    ]


def step_line(status: TrainerStatus) -> str:
    """One step on one line."""
    return "  ".join(f"{name} {value}" for name, value in figures(status))
