"""Figures of the rewards of groups: of each reward function, and of what failed.

Pure. A function's figures are over the trajectories to which it gave a value: a failure is no value, never a 0, and
takes nothing from the figures of the others. `penstock.contracts.outcomes` has which trajectories count.
"""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import failure_of, rewards_of, values_by_function

REASON_CHARACTERS = 160  # a reason may hold a traceback or an answer
MOST_REASONS = 10
OTHER_REASONS = "other reasons"


def function_figures(groups: Iterable[ScoredGroup]) -> dict[str, dict[str, float]]:
    """Of each function: mean and std of the values that it gave, if it gave any, and num_failed."""
    given: dict[str, list[float | None]] = {}
    for group in groups:
        for each in values_by_function(group):
            for name, value in each.items():
                given.setdefault(name, []).append(value)
    return {name: _figures(values) for name, values in given.items()}


def _figures(values: list[float | None]) -> dict[str, float]:
    valid = np.array([value for value in values if value is not None])
    failed = {"num_failed": len(values) - len(valid)}
    if not len(valid):
        return dict(failed)
    with np.errstate(over="ignore"):  # one value has no bound, only the sum has
        return {"mean": float(valid.mean()), "std": float(valid.std()), **failed}


def first_failure(group: ScoredGroup) -> str:
    """The reason of the first failed trajectory; "" if none failed."""
    pairs = zip(group.group.trajectories, group.scores, strict=True)
    return next((why for pair in pairs if (why := failure_of(*pair))), "")


def failures_of(groups: Iterable[ScoredGroup]) -> dict[str, int]:
    """Why trajectories of the groups have no reward, each reason in short with their number; the most frequent first.

    {"my_rewards:judge: TimeoutError: no answer within 5 s": 3}
    """
    pairs = (pair for group in groups for pair in zip(group.group.trajectories, group.scores, strict=True))
    return most_frequent(why for pair in pairs if (why := failure_of(*pair)))


def most_frequent(reasons: Iterable[str]) -> dict[str, int]:
    """The number of each of the most frequent reasons, in short; of the others together."""
    counted = Counter(" ".join(reason.split())[:REASON_CHARACTERS] for reason in reasons)
    shown = dict(counted.most_common(MOST_REASONS))
    others = counted.total() - sum(shown.values())
    return {**shown, OTHER_REASONS: others} if others else shown


def lowest_right(group: ScoredGroup, success: float) -> float | None:
    """The lowest reward of a group whose completions are all right: those with a reward reach `success`. Else None."""
    lowest = min((reward for reward in rewards_of(group) if reward is not None), default=-math.inf)
    return lowest if lowest >= success else None


def failed_share(group: ScoredGroup) -> float:
    """The share of its trajectories that failed."""
    rewards = rewards_of(group)
    return sum(reward is None for reward in rewards) / len(rewards)
