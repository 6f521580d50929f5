"""The counts and figures of a batch: groups, completions, tokens, rewards, advantages, lengths, age.

Owns their definitions. Invariant: they cover all groups with enough rewards and all their valid completions, whether
or not these need a forward pass. Pure.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.contracts import ScoredGroup, Trajectory
from penstock.contracts.outcomes import rewards_of
from penstock_trainer.batching.reward_columns import RewardScale, reward_columns
from penstock_trainer.grpo import varies


class CompletionIndex(NamedTuple):
    """A completion or episode of a batch: the number of its group, and its own within the group. The first: (0, 0)."""

    group: int
    completion: int


@dataclass(frozen=True)
class Candidate:
    """A completion or episode that counts: its reward is valid, and its group has enough valid rewards.

    num_loss_tokens: 0 if it is left out, since it was truncated. num_trained_tokens: those of its loss tokens that are
    not too old (`masking`).
    """

    index: CompletionIndex
    trajectory: Trajectory
    advantage: float
    num_loss_tokens: int
    num_trained_tokens: int


@dataclass(frozen=True)
class BatchCounts:
    """The contents of a batch, counted before anything is left out; an episode counts as a completion.

    num_groups: with at least two valid rewards: the denominator. num_failed_groups: the others.
    num_degenerate_groups: of the former, those whose rewards are all equal.
    num_loss_tokens: of valid completions that are not left out; masked_stale: the share of them that is too old
    (`masking`).
    num_truncated_completions: of all, those that a limit on their length ended.
    num_stale_completions, num_stale_groups: valid completions all of whose loss tokens are too old; groups with an
    advantage that have no gradient for that reason.
    failed_reward_ratio, truncated_ratio: of all completions of the batch, those without a reward, and those that
    reached a limit of length. no_signal_ratio: of all its groups, those without an advantage: degenerate or failed.
    reward_*: over valid completions, as scored; nan without any. shaped_reward_*: of the same, as advantages are made
    of them, but for a KL term in the reward; clipped_reward_ratio: the share that reward.clip changed; both nan too.
    advantage_*: over the valid completions of the counted groups. length_*: mean loss tokens of valid completions
    (generated) and of what is not masked of those with an advantage (trained; nan if none has one); length_bias is
    trained over generated, 1 without bias.
    """

    num_groups: int
    num_failed_groups: int
    num_degenerate_groups: int
    num_completions: int
    num_failed_completions: int
    num_truncated_completions: int
    num_loss_tokens: int
    masked_stale: float
    num_stale_completions: int
    num_stale_groups: int
    failed_reward_ratio: float
    truncated_ratio: float
    no_signal_ratio: float
    reward_mean: float
    reward_std: float
    reward_min: float
    reward_max: float
    shaped_reward_mean: float
    shaped_reward_std: float
    clipped_reward_ratio: float
    advantage_std: float
    advantage_min: float
    advantage_max: float
    length_generated: float
    length_trained: float
    length_bias: float


def count_batch(
    groups: Sequence[ScoredGroup],
    candidates: Sequence[Sequence[Candidate]],
    shaped: Sequence[float],
    scale: RewardScale,
    tolerance: float,
    functions: Iterable[str],
) -> BatchCounts:
    """The counts of a batch. candidates: by group, of the groups that have enough valid rewards.

    shaped: the rewards of all valid completions, as shaped. scale: with which a group's rewards are compared.
    tolerance: a group whose rewards differ by no more is degenerate. functions: those that have an advantage each; the
    group is degenerate if the values of none of them differ.
    """
    rewards = [reward for group in groups for reward in rewards_of(group)]
    values = [reward for reward in rewards if reward is not None]
    flat = [each for group in candidates for each in group]
    num_loss_tokens = sum(each.num_loss_tokens for each in flat)
    num_trained_tokens = sum(each.num_trained_tokens for each in flat)
    advantages = [each.advantage for each in flat]
    trajectories = [each for group in groups for each in group.group.trajectories]
    names = tuple(functions)
    columns = [reward_columns(groups[group[0].index.group], names, scale) for group in candidates]
    num_degenerate = sum(not any(varies(column, tolerance) for column in each) for each in columns)
    num_failed = len(groups) - len(candidates)
    generated_mean = _mean([each.trajectory.num_loss_tokens for each in flat])
    trained = [each.num_trained_tokens for each in flat if each.advantage and each.num_trained_tokens]
    trained_mean = _mean(trained) if trained else math.nan
    return BatchCounts(
        num_groups=len(candidates),
        num_failed_groups=num_failed,
        num_degenerate_groups=num_degenerate,
        num_completions=len(flat),
        num_failed_completions=len(rewards) - len(values),
        num_truncated_completions=sum(each.is_truncated for each in trajectories),
        num_loss_tokens=num_loss_tokens,
        masked_stale=1 - num_trained_tokens / num_loss_tokens if num_loss_tokens else 0.0,
        num_stale_completions=sum(each.num_loss_tokens > 0 == each.num_trained_tokens for each in flat),
        num_stale_groups=sum(map(_is_stale, candidates)),
        failed_reward_ratio=1 - len(values) / len(rewards) if rewards else 0.0,
        truncated_ratio=_mean([each.is_truncated for each in trajectories]),
        no_signal_ratio=(num_degenerate + num_failed) / len(groups) if groups else 0.0,
        reward_mean=_mean(values) if values else math.nan,
        reward_std=_deviation(values),
        reward_min=min(values, default=math.nan),
        reward_max=max(values, default=math.nan),
        shaped_reward_mean=_mean(shaped) if shaped else math.nan,
        shaped_reward_std=_deviation(shaped),
        clipped_reward_ratio=_mean([scale.clips(value) for value in values]) if values else math.nan,
        advantage_std=math.sqrt(_mean([value**2 for value in advantages])),
        advantage_min=min(advantages, default=0.0),
        advantage_max=max(advantages, default=0.0),
        length_generated=generated_mean,
        length_trained=trained_mean,
        length_bias=trained_mean / generated_mean if trained else math.nan,
    )


def _is_stale(group: Sequence[Candidate]) -> bool:
    """Whether masking took the group's gradient."""
    moving = [each for each in group if each.advantage]
    return any(each.num_loss_tokens for each in moving) and not any(each.num_trained_tokens for each in moving)


def _deviation(values: Sequence[float]) -> float:
    """Of all of them; nan without any."""
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values])) if values else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
