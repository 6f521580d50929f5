"""From raw lines to the figures of a table: scores of a run, and their mean and interval over seeds.

Pure.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.baselines.lines import Line

LAST_EVALUATIONS = 3
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, two-sided 95 %, by the number of values (degrees of freedom: one less)."""


@dataclass(frozen=True)
class Interval:
    """The mean of a few values, and half the width of its 95 % interval (nan of one value)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} \u00b1 {self.half_width:.2f}"


def interval(values: Iterable[float]) -> Interval:
    """Of values that are normally distributed; ValueError of more than ten.

    >>> str(interval([0.9, 0.8, 1.0]))
    '0.90 \u00b1 0.25'
    """
    found = np.fromiter(values, dtype=np.float64)
    if found.size == 1:
        return Interval(float(found[0]), math.nan)
    if found.size not in T_95:
        raise ValueError(f"{found.size} values: expected 1 to {max(T_95)}")
    return Interval(float(found.mean()), T_95[found.size] * float(found.std(ddof=1)) / math.sqrt(found.size))


def final_score(line: Line) -> float:
    """Held-out accuracy at the end: the mean of the last evaluations."""
    return float(np.mean(line.held_out[-LAST_EVALUATIONS:]))


def area(line: Line) -> float:
    """The mean reward of the trained batches: the area under the curve, over the number of steps."""
    return float(np.mean(line.reward))


def worst_fall(line: Line) -> float:
    """How far held-out accuracy fell below its best until then, at most."""
    held_out = np.asarray(line.held_out)
    return float((np.maximum.accumulate(held_out) - held_out).max())


def first_step_below(values: Sequence[float], bound: float) -> int | None:
    """The first step with a value below `bound`; None without one."""
    return next((step for step, value in enumerate(values) if value < bound), None)
