"""The rewards of a group, as scored: None marks a trajectory that failed. And those of each reward function.

Owns which trajectories count. Invariant: one without a score never counts, nor does an episode that the infrastructure
ended, or in which nothing was sampled, whatever a reward function says of its empty transcript. Pure.

A function's figures are over the trajectories to which it gave a value: a failure is no value, never a 0, and takes
nothing from the figures of the others.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from penstock.contracts import Episode, Score, ScoredGroup, Trajectory

NOTHING_SAMPLED = "the episode has no sampled token"
REASON_CHARACTERS = 160  # a reason may hold a traceback or an answer
MOST_REASONS = 10
OTHER_REASONS = "other reasons"


def rewards_of(group: ScoredGroup) -> list[float | None]:
    """The reward of each trajectory; None if it failed."""
    values = [score.value for score in group.scores]
    if not group.group.ticket.environment:
        return values
    triples = zip(group.group.episodes, group.scores, values, strict=True)
    return [None if failure_of(episode, score) else value for episode, score, value in triples]


def values_by_function(group: ScoredGroup) -> list[dict[str, float | None]]:
    """The unweighted value of each function, by trajectory; None: it failed. Functions that were not called are absent.

    A group of two functions, of which the second failed for the last completion:

    [{"math": 1.0, "format_regex": 0.0}, {"math": 0.0, "format_regex": None}]
    """
    return [
        _values(group.functions, reward, score) for reward, score in zip(rewards_of(group), group.scores, strict=True)
    ]


def _values(functions: tuple[str, ...], reward: float | None, score: Score) -> dict[str, float | None]:
    if score.value is not None and reward is None:
        return {}  # what they said of an episode that does not count
    if len(functions) == 1 and not score.values:
        return {functions[0]: reward}
    return dict(zip(functions, score.values, strict=False))


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


def failure_of(trajectory: Trajectory, score: Score) -> str:
    """Why a trajectory has no reward; "" if it has one."""
    if score.value is None:
        return score.failure
    if isinstance(trajectory, Episode):
        if trajectory.end == "failure":
            return trajectory.score.failure or "the episode failed"
        if not trajectory.num_tokens:
            return NOTHING_SAMPLED
    return ""


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


def failed_share(group: ScoredGroup) -> float:
    """The share of its trajectories that failed."""
    rewards = rewards_of(group)
    return sum(reward is None for reward in rewards) / len(rewards)
