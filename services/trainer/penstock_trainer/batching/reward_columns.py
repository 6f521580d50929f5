"""What a group's advantages are made of: its rewards, or the values of each of some reward functions.

Invariant: a completion without a reward has no value in any column. Pure.
"""

from collections.abc import Iterable

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of, values_by_function
from penstock.errors import DataError

Column = list[float | None]


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


def reward_columns(group: ScoredGroup, functions: Iterable[str]) -> list[Column]:
    """The rewards alone, or the columns of the functions if there are any."""
    names = tuple(functions)
    return list(function_columns(group, names).values()) if names else [rewards_of(group)]
