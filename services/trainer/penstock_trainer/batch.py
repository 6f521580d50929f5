"""From scored groups to the completions that are trained on, with their advantages and weights.

Owns the batch's denominators: they count every group and every valid completion, whether or not it needs a forward
pass. Pure: no config, no I/O. Called by the learner.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from penstock.contracts import Completion, ScoredGroup, unpack_float32, unpack_int32
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
class BatchCounts:
    """What a batch holds, counted before anything is left out.

    num_groups: with at least two valid rewards: the denominator. num_failed_groups: the others.
    num_degenerate_groups: of the former, those whose rewards are all equal.
    num_loss_tokens: of valid completions. reward_*: over valid completions, as scored; nan without any.
    advantage_*: over the valid completions of the counted groups. length_*: mean loss tokens of valid completions
    (generated) and of those with an advantage (trained); length_bias is trained over generated, 1 without bias.
    """

    num_groups: int
    num_failed_groups: int
    num_degenerate_groups: int
    num_completions: int
    num_failed_completions: int
    num_loss_tokens: int
    reward_mean: float
    reward_std: float
    reward_min: float
    reward_max: float
    advantage_std: float
    advantage_min: float
    advantage_max: float
    length_generated: float
    length_trained: float
    length_bias: float


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
        _sample(group, version, (b, g), advantage=0.0, weight=0.0)
        for b, group in enumerate(groups)
        for g, score in enumerate(group.scores)
        if score.value is not None and any(group.group.completions[g].loss_mask)
    ]


def make_batch(
    groups: Sequence[ScoredGroup],
    rules: BatchRules,
    *,
    version: int,
    penalties: Mapping[tuple[int, int], float] | None = None,
) -> Batch:
    """Advantages and weights of all groups; samples are the completions that need a forward pass.

    version: of the weights under training. penalties: subtracted from rewards, by place (a KL term in the reward).
    A completion whose reward failed is never a sample. One whose advantage is 0 is a sample only if
    `rules.with_zero_advantage`, but counts in the denominators.
    """
    chosen = [b for b, group in enumerate(groups) if num_valid(group) >= MIN_VALID]
    advantage_of = _advantages(groups, chosen, rules, penalties or {})
    minibatches = [
        _minibatch(groups, part, advantage_of, rules, version) for part in _parts(chosen, rules.num_minibatches)
    ]
    return Batch(tuple(minibatches), _counts(groups, chosen, advantage_of))


def _penalty(completion: Completion, overlong: Overlong) -> float:
    return overlong_penalty(
        len(completion.loss_mask),
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
    version: int,
) -> tuple[Sample, ...]:
    lengths = {
        (b, g): num_loss
        for b in part
        for g, completion in enumerate(groups[b].group.completions)
        if (b, g) in advantage_of and (num_loss := sum(map(bool, completion.loss_mask)))
    }
    return tuple(
        _sample(
            groups[b],
            version,
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


def _counts(
    groups: Sequence[ScoredGroup], chosen: list[int], advantage_of: Mapping[tuple[int, int], float]
) -> BatchCounts:
    values = [score.value for group in groups for score in group.scores if score.value is not None]
    mean = math.fsum(values) / len(values) if values else math.nan
    lengths = {(b, g): sum(map(bool, groups[b].group.completions[g].loss_mask)) for b, g in advantage_of}
    trained = [length for place, length in lengths.items() if advantage_of[place]]
    generated_mean = _mean(list(lengths.values()))
    trained_mean = _mean(trained)
    return BatchCounts(
        num_groups=len(chosen),
        num_failed_groups=len(groups) - len(chosen),
        num_degenerate_groups=sum(not varies([score.value for score in groups[b].scores]) for b in chosen),
        num_completions=len(advantage_of),
        num_failed_completions=sum(score.value is None for group in groups for score in group.scores),
        num_loss_tokens=sum(lengths.values()),
        reward_mean=mean,
        reward_std=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) if values else math.nan,
        reward_min=min(values, default=math.nan),
        reward_max=max(values, default=math.nan),
        advantage_std=math.sqrt(_mean([value**2 for value in advantage_of.values()])),
        advantage_min=min(advantage_of.values(), default=0.0),
        advantage_max=max(advantage_of.values(), default=0.0),
        length_generated=generated_mean,
        length_trained=trained_mean,
        length_bias=trained_mean / generated_mean if trained_mean else 1.0,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _sample(group: ScoredGroup, version: int, place: tuple[int, int], *, advantage: float, weight: float) -> Sample:
    completion = group.group.completions[place[1]]
    return Sample(
        prompt_ids=tuple(unpack_int32(group.group.ticket.prompt_ids)),
        token_ids=tuple(unpack_int32(completion.token_ids)),
        loss_mask=tuple(map(bool, completion.loss_mask)),
        behaviour=tuple(unpack_float32(completion.logprobs)),
        lags=tuple(version - span.policy.number for span in completion.spans for _ in range(span.start, span.end)),
        advantage=advantage,
        weight=weight,
        place=place,
    )
