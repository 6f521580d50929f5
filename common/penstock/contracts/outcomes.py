"""The rewards of a group, as scored: None marks a trajectory that failed. And what each reward function gave.

Owns which trajectories count, for the trainer and for readers of its step files. Invariant: one without a score never
counts, nor does an episode that the infrastructure ended, or in which nothing was sampled, whatever a reward function
says of its empty transcript. Pure.
"""

from penstock.contracts.groups import ScoredGroup
from penstock.contracts.trajectories import Episode, Score, Trajectory

NOTHING_SAMPLED = "the episode has no sampled token"


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
