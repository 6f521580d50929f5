"""What a group's advantages are made of: its rewards, or the values of each of some reward functions.

Invariant: a completion without a reward has no value in any column. Pure.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of, values_by_function
from penstock.errors import DataError

Column = list[float | None]


@dataclass(frozen=True)
class RewardScale:
    """min(max(scale * reward, low), high): the reward as advantages see it, before any penalty.

    clip: (low, high); None: no bounds. A reward that failed stays a failure.
    """

    scale: float = 1.0
    clip: tuple[float, float] | None = None

    def column(self, group: ScoredGroup) -> Column:
        """The scaled reward of each trajectory of a group; None if it failed."""
        return [None if reward is None else self.of(reward) for reward in rewards_of(group)]

    def of(self, reward: float) -> float:
        """Of one reward.

        >>> RewardScale(0.5, (-1.0, 1.0)).of(3.0)
        1.0
        """
        if self.clip is None:
            return self.scale * reward
        return min(max(self.scale * reward, self.clip[0]), self.clip[1])

    def clips(self, reward: float) -> bool:
        """Whether the bounds change it."""
        return self.of(reward) != self.scale * reward


AS_SCORED = RewardScale()


def function_columns(group: ScoredGroup, functions: Iterable[str]) -> dict[str, Column]:
    """The values of each function that was called for the group, by completion; None without a reward.

    DataError if none was: the group was scored by other functions.
    """
    values = values_by_function(group)
    rewards = rewards_of(group)
    columns: dict[str, Column] = {}
    for name in functions:
        pairs = zip(values, rewards, strict=True)
        column = [None if reward is None else each.get(name) for each, reward in pairs]
        if any(value is not None for value in column):
            columns[name] = column
    if not columns and any(reward is not None for reward in rewards):
        raise DataError(
            f"ticket {group.group.ticket.number} was scored by {', '.join(group.functions) or 'unknown functions'}: "
            f"expected one of loss.advantage.by_function ({', '.join(functions)}); change that key"
        )
    return columns


def reward_columns(group: ScoredGroup, functions: Iterable[str], scale: RewardScale = AS_SCORED) -> list[Column]:
    """The scaled rewards alone, or the columns of the functions if there are any."""
    names = tuple(functions)
    return list(function_columns(group, names).values()) if names else [scale.column(group)]
