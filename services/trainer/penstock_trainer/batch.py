"""From scored groups to the completions that are trained on, with their advantages and weights.

Owns the batch's denominators: they count every group and every valid completion, whether or not it
needs a forward pass. Pure: no config, no I/O. Called by the learner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock.contracts import Completion, ScoredGroup, unpack_float32, unpack_int32
from penstock_trainer.grpo import group_advantages, sequence_weight

MIN_VALID = 2  # a group's mean and standard deviation need two rewards


@dataclass(frozen=True)
class Sample:
    """One completion to train on: T completion tokens after a prompt.

    prompt_ids, token_ids int; loss_mask, behaviour of length T; advantage and weight of every loss token.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    behaviour: tuple[float, ...]
    advantage: float
    weight: float


@dataclass(frozen=True)
class BatchCounts:
    """What a batch holds, counted before anything is left out.

    num_groups: with at least two valid rewards: the denominator. num_failed_groups: the others.
    num_degenerate_groups: of the former, those whose rewards are all equal.
    num_loss_tokens: of valid completions. reward_mean: over valid completions, nan without any.
    """

    num_groups: int
    num_failed_groups: int
    num_degenerate_groups: int
    num_completions: int
    num_failed_completions: int
    num_loss_tokens: int
    reward_mean: float


@dataclass(frozen=True)
class Batch:
    """Samples in the order of their groups, and the counts of the whole batch."""

    samples: tuple[Sample, ...]
    counts: BatchCounts


def is_degenerate(group: ScoredGroup) -> bool:
    """True when the group cannot give a gradient: fewer than two valid rewards, or all of them equal."""
    values = [score.value for score in group.scores if score.value is not None]
    return len(values) < MIN_VALID or min(values) == max(values)


def make_batch(groups: Sequence[ScoredGroup], *, advantage_eps: float, with_zero_advantage: bool) -> Batch:
    """Advantages and weights of all groups; samples are the completions that need a forward pass.

    A completion whose reward failed is never a sample. One whose advantage is 0 is a sample only if
    `with_zero_advantage` (a KL term has a gradient there), but counts in the denominators.
    """
    trained = [group for group in groups if _num_valid(group) >= MIN_VALID]
    samples: list[Sample] = []
    num_loss_tokens = 0
    for group in trained:
        weight = sequence_weight(_num_valid(group), len(trained))
        prompt_ids = tuple(unpack_int32(group.group.ticket.prompt_ids))
        for completion, advantage, valid in _with_advantages(group, advantage_eps):
            num_loss = sum(map(bool, completion.loss_mask)) if valid else 0
            num_loss_tokens += num_loss
            if num_loss and (advantage or with_zero_advantage):
                samples.append(_sample(prompt_ids, completion, advantage, weight))
    values = [score.value for group in groups for score in group.scores if score.value is not None]
    counts = BatchCounts(
        num_groups=len(trained),
        num_failed_groups=len(groups) - len(trained),
        num_degenerate_groups=sum(map(is_degenerate, trained)),
        num_completions=sum(map(_num_valid, trained)),
        num_failed_completions=sum(score.value is None for group in groups for score in group.scores),
        num_loss_tokens=num_loss_tokens,
        reward_mean=math.fsum(values) / len(values) if values else math.nan,
    )
    return Batch(tuple(samples), counts)


def _num_valid(group: ScoredGroup) -> int:
    return sum(score.value is not None for score in group.scores)


def _with_advantages(group: ScoredGroup, eps: float) -> list[tuple[Completion, float, bool]]:
    valid_G = [score.value is not None for score in group.scores]
    rewards_G = [0.0 if score.value is None else score.value for score in group.scores]
    advantages = group_advantages(torch.tensor([rewards_G], dtype=torch.float64), torch.tensor([valid_G]), eps)
    return list(zip(group.group.completions, advantages[0].tolist(), valid_G, strict=True))


def _sample(prompt_ids: tuple[int, ...], completion: Completion, advantage: float, weight: float) -> Sample:
    return Sample(
        prompt_ids=prompt_ids,
        token_ids=tuple(unpack_int32(completion.token_ids)),
        loss_mask=tuple(map(bool, completion.loss_mask)),
        behaviour=tuple(unpack_float32(completion.logprobs)),
        advantage=advantage,
        weight=weight,
    )
