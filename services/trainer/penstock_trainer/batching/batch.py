"""From scored groups to the completions that are trained on, with their advantages and weights.

Owns the batch's denominators: they count every group and every valid completion, whether or not it needs a forward
pass. Pure: no config, no I/O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from penstock.contracts import Completion, ScoredGroup, unpack_float32, unpack_int32
from penstock_trainer.batching.counts import BatchCounts, count_batch
from penstock_trainer.batching.masking import token_lags, trained_mask
from penstock_trainer.grpo import Aggregation, Baseline, Scale, advantages, overlong_penalty, sequence_weight

MIN_VALID = 2  # a group's mean and standard deviation need two rewards


@dataclass(frozen=True)
class Sample:
    """One completion to train on: T completion tokens after a prompt.

    prompt_ids, token_ids int; loss_mask, behaviour, lags of length T; advantage and weight of every loss token.
    place: (group, completion) in the batch. lags: versions from the sampler's weights to those under training.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    behaviour: tuple[float, ...]
    lags: tuple[int, ...]
    advantage: float
    weight: float
    place: tuple[int, int] = (0, 0)

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True)
class Overlong:
    """The overlong penalty: see `penstock_trainer.grpo.overlong_penalty`."""

    max_new_tokens: int
    buffer_tokens: int = 0
    penalty: float = 1.0


@dataclass(frozen=True)
class BatchRules:
    """How rewards become advantages and weights.

    with_zero_advantage: completions without an advantage need a forward pass too, because another term has a gradient.
    """

    overlong: Overlong
    baseline: Baseline = "group"
    scale: Scale = "group"
    eps: float = 1e-6
    aggregation: Aggregation = "seq-mean-token-sum"
    norm_length: int = 1
    num_minibatches: int = 1
    with_zero_advantage: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples in the order of their groups, by mini-batch, and the counts of the whole batch."""

    minibatches: tuple[tuple[Sample, ...], ...]
    counts: BatchCounts

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for minibatch in self.minibatches for sample in minibatch)


def num_valid(group: ScoredGroup) -> int:
    """Completions whose reward did not fail."""
    return sum(score.value is not None for score in group.scores)


def shaped_rewards(group: ScoredGroup, overlong: Overlong) -> list[float | None]:
    """The group's rewards with the overlong penalty; None where a reward failed."""
    return [
        None if score.value is None else score.value + _penalty(completion, overlong)
        for score, completion in zip(group.scores, group.group.completions, strict=True)
    ]


def varies(rewards: Sequence[float | None]) -> bool:
    """Whether the valid rewards differ: otherwise every advantage over the group's mean is 0."""
    return len({reward for reward in rewards if reward is not None}) > 1


def valid_samples(groups: Sequence[ScoredGroup], *, version: int) -> list[Sample]:
    """All completions with a reward and a loss token, without advantage or weight."""
    return [
        _sample(group, version, None, (b, g), advantage=0.0, weight=0.0)
        for b, group in enumerate(groups)
        for g, score in enumerate(group.scores)
        if score.value is not None and group.group.completions[g].num_loss_tokens
    ]


def make_batch(
    groups: Sequence[ScoredGroup],
    rules: BatchRules,
    *,
    version: int,
    max_lag: int | None = None,
    penalties: Mapping[tuple[int, int], float] | None = None,
) -> Batch:
    """Advantages and weights of all groups; samples are the completions that need a forward pass.

    version: of the weights under training. max_lag: tokens that lag more versions are masked (`masking`).
    penalties: subtracted from rewards, by place (a KL term in the reward).
    A completion whose reward failed is never a sample. One whose advantage is 0 is a sample only if
    `rules.with_zero_advantage`, one whose loss tokens are all masked is none; both count in the denominators.
    """
    chosen = [b for b, group in enumerate(groups) if num_valid(group) >= MIN_VALID]
    advantage_of = _advantages(groups, chosen, rules, penalties or {})
    minibatches = [
        _minibatch(groups, part, advantage_of, rules, (version, max_lag))
        for part in _parts(chosen, rules.num_minibatches)
    ]
    num_degenerate_groups = sum(not varies([score.value for score in groups[b].scores]) for b in chosen)
    counts = count_batch(groups, chosen, advantage_of, (version, max_lag), num_degenerate_groups=num_degenerate_groups)
    return Batch(tuple(minibatches), counts)


def _penalty(completion: Completion, overlong: Overlong) -> float:
    return overlong_penalty(
        completion.num_tokens,
        max_new_tokens=overlong.max_new_tokens,
        buffer_tokens=overlong.buffer_tokens,
        penalty=overlong.penalty,
    )


def _advantages(
    groups: Sequence[ScoredGroup], chosen: list[int], rules: BatchRules, penalties: Mapping[tuple[int, int], float]
) -> dict[tuple[int, int], float]:
    """By place, of the valid completions of the chosen groups."""
    if not chosen:
        return {}
    width = max(len(groups[b].scores) for b in chosen)
    rewards_BG = torch.zeros(len(chosen), width, dtype=torch.float64)
    valid_BG = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, b in enumerate(chosen):
        for g, reward in enumerate(shaped_rewards(groups[b], rules.overlong)):
            if reward is not None:
                rewards_BG[row, g] = reward - penalties.get((b, g), 0.0)
                valid_BG[row, g] = True
    values_BG = advantages(rewards_BG, valid_BG, baseline=rules.baseline, scale=rules.scale, eps=rules.eps).tolist()
    places = [(row, b, g) for row, b in enumerate(chosen) for g in range(width) if valid_BG[row, g]]
    return {(b, g): values_BG[row][g] for row, b, g in places}


def _parts(chosen: list[int], num_parts: int) -> list[list[int]]:
    """Consecutive parts of nearly equal size; fewer where there are fewer groups."""
    count = min(num_parts, len(chosen))
    bounds = [len(chosen) * part // count for part in range(count + 1)] if count else []
    return [chosen[start:end] for start, end in pairwise(bounds)]


def _minibatch(
    groups: Sequence[ScoredGroup],
    part: list[int],
    advantage_of: Mapping[tuple[int, int], float],
    rules: BatchRules,
    age: tuple[int, int | None],
) -> tuple[Sample, ...]:
    """`age`: version under training and the largest lag that is trained."""
    lengths = {
        (b, g): num_loss
        for b in part
        for g, completion in enumerate(groups[b].group.completions)
        if (b, g) in advantage_of and (num_loss := completion.num_loss_tokens)
    }
    samples = (
        _sample(
            groups[b],
            *age,
            (b, g),
            advantage=advantage_of[b, g],
            weight=sequence_weight(
                rules.aggregation,
                num_groups=len(part),
                num_valid_in_group=num_valid(groups[b]),
                num_tokens=num_loss,
                num_tokens_in_batch=sum(lengths.values()),
                norm_length=rules.norm_length,
            ),
        )
        for (b, g), num_loss in lengths.items()
        if advantage_of[b, g] or rules.with_zero_advantage
    )
    return tuple(sample for sample in samples if sample.num_loss_tokens)


def _sample(
    group: ScoredGroup,
    version: int,
    max_lag: int | None,
    place: tuple[int, int],
    *,
    advantage: float,
    weight: float,
) -> Sample:
    completion = group.group.completions[place[1]]
    return Sample(
        prompt_ids=tuple(unpack_int32(group.group.ticket.prompt_ids)),
        token_ids=tuple(unpack_int32(completion.token_ids)),
        loss_mask=trained_mask(completion, version, max_lag),
        behaviour=tuple(unpack_float32(completion.logprobs)),
        lags=token_lags(completion, version),
        advantage=advantage,
        weight=weight,
        place=place,
    )
