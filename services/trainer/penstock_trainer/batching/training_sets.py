"""Figures of a batch by training set. Pure."""

import math
from collections.abc import Callable, Sequence

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of


def set_figures(
    groups: Sequence[ScoredGroup], set_of: Callable[[int], str], has_signal: Callable[[ScoredGroup], bool]
) -> dict[str, dict[str, float]]:
    """By set: num_prompts, num_rewards, reward_mean (if there are any), no_signal_ratio. Empty for a run of one set.

    set_of: the name of a ticket's set; has_signal: whether a group's rewards differ. The ratio is of the set's prompts.
    """
    by_set: dict[str, list[ScoredGroup]] = {}
    for group in groups:
        if name := set_of(group.group.ticket.number):
            by_set.setdefault(name, []).append(group)
    return {name: _figures(by_set[name], has_signal) for name in sorted(by_set)}


def _figures(groups: Sequence[ScoredGroup], has_signal: Callable[[ScoredGroup], bool]) -> dict[str, float]:
    values = [reward for group in groups for reward in rewards_of(group) if reward is not None]
    return {
        "num_prompts": len(groups),
        "num_rewards": len(values),
        **({"reward_mean": math.fsum(values) / len(values)} if values else {}),
        "no_signal_ratio": sum(not has_signal(group) for group in groups) / len(groups),
    }
