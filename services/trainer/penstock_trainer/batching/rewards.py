"""The rewards of a group, as scored: None marks a trajectory that failed.

Owns which trajectories count. Invariant: one without a score never counts, nor does an episode that the infrastructure
ended, or in which nothing was sampled, whatever a reward function says of its empty transcript. Pure.
"""

from collections import Counter
from collections.abc import Iterable

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
