"""Which evaluation of a run is its best, and for how many evaluations none was better.

Owns both rules. Evaluations are compared by one figure of one set (`eval.best_metric`, `eval.best_set`), and only those
that ask the same as the last one: the same prompts, the same threshold. Of equal ones the earliest is the best. An
evaluation without the figure, since every reward failed, counts for nothing. Pure: lines are those of `evals.jsonl`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from penstock.records.figures import Line, asks_the_same, heldout_accuracy, heldout_reward, set_of

Metric = Literal["accuracy", "reward"]


@dataclass(frozen=True)
class Judged:
    """An evaluation: the steps before it, its figure, and the version of all its completions; None: of several."""

    steps: int
    value: float
    version: int | None


def judged(evaluations: Iterable[Line], name: str, metric: Metric) -> list[Judged]:
    """The evaluations of a set that can be compared, by their steps."""
    lines = sorted((line for line in evaluations if set_of(line) == name), key=lambda line: int(line["steps"]))
    value_of = heldout_accuracy if metric == "accuracy" else heldout_reward
    found = []
    for line in lines:
        if asks_the_same(line, lines[-1]) and (value := value_of(line)) is not None:
            oldest, newest = int(line["oldest_version"]), int(line["newest_version"])
            found.append(Judged(int(line["steps"]), value, oldest if oldest == newest else None))
    return found


def best_of(evaluations: Iterable[Judged], fits: Callable[[Judged], bool] = lambda each: True) -> Judged | None:
    """The best of those that fit; None if none does.

    >>> best_of([Judged(0, 0.25, 0), Judged(8, 0.75, 8), Judged(16, 0.75, 16)])
    Judged(steps=8, value=0.75, version=8)
    """
    return max((each for each in evaluations if fits(each)), key=lambda each: (each.value, -each.steps), default=None)


@dataclass(frozen=True)
class Patience:
    """best: the last evaluation that was better than all before it. waited: evaluations since then, without one."""

    best: Judged
    waited: int


def patience_of(evaluations: Iterable[Judged], min_delta: float) -> Patience | None:
    """After all of them; None without any. Better is what exceeds the best before by more than `min_delta`.

    >>> values = (0.25, 0.5, 0.5625, 0.5)
    >>> patience_of([Judged(8 * n, value, n) for n, value in enumerate(values)], min_delta=0.125)
    Patience(best=Judged(steps=8, value=0.5, version=1), waited=2)
    """
    found: Patience | None = None
    for each in evaluations:
        if found is None or each.value - min_delta > found.best.value:
            found = Patience(each, 0)
        else:
            found = Patience(found.best, found.waited + 1)
    return found
