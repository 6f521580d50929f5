"""Which completions of a batch people are shown. Pure.

Invariant: the choice depends on the groups alone, so that a step that is trained again shows the same ones.
"""

import math
from collections.abc import Iterator, Sequence

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of
from penstock_trainer.batching.counts import CompletionIndex


def choose_shown(groups: Sequence[ScoredGroup], most: int) -> list[CompletionIndex]:
    """At most `most` completions: one that failed, if any did, then whole groups, those with the widest rewards first.

    A group shows what the policy is taught: the same prompt answered well and badly. A group that does not fit is
    represented by completions at even distances between its worst and its best. Ties go to the earlier group.
    """
    failed = next(_failures(groups), None) if most else None
    chosen = [] if failed is None else [failed]
    for b in sorted(range(len(groups)), key=lambda b: (-_variance(groups[b]), b)):
        rewards = rewards_of(groups[b])
        valid = [g for g, reward in enumerate(rewards) if reward is not None]
        by_reward = sorted(valid, key=lambda g: (rewards[g], g))
        chosen += [CompletionIndex(b, g) for g in sorted(_spread(by_reward, most - len(chosen)))]
    return chosen


def _failures(groups: Sequence[ScoredGroup]) -> Iterator[CompletionIndex]:
    for b, group in enumerate(groups):
        yield from (CompletionIndex(b, g) for g, reward in enumerate(rewards_of(group)) if reward is None)


def _variance(group: ScoredGroup) -> float:
    values = [reward for reward in rewards_of(group) if reward is not None]
    if not values:
        return -1.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def _spread(ranked: Sequence[int], most: int) -> list[int]:
    """All, or `most` of them at even distances, the first and the last among them."""
    if len(ranked) <= most:
        return list(ranked)
    if most <= 1:
        return list(ranked[-1:]) if most else []
    return [ranked[round(number * (len(ranked) - 1) / (most - 1))] for number in range(most)]
