"""The rewards of a group, as scored: None marks a trajectory that failed.

Owns which trajectories count. Invariant: one without a score never counts, nor does an episode that the infrastructure
ended, or in which nothing was sampled, whatever a reward function says of its empty transcript. Pure.
"""

from penstock.contracts import Episode, Score, ScoredGroup, Trajectory

NOTHING_SAMPLED = "the episode has no sampled token"


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


def failed_share(group: ScoredGroup) -> float:
    """The share of its trajectories that failed."""
    rewards = rewards_of(group)
    return sum(reward is None for reward in rewards) / len(rewards)
