"""From scored groups to the samples that are trained on, with their advantages and weights.

Owns the batch's denominators: they count every group and every valid trajectory (a completion, or an episode with all
its paths), whether or not it needs a forward pass. Tokens stay packed: arrays are views of the messages, and so
read-only. Pure: no config, no I/O.

    groups -> candidates, with advantages -> counts
                                         '-> mini-batches -> samples, with weights
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.contracts import ScoredGroup, Trajectory
from penstock.contracts.outcomes import rewards_of
from penstock_trainer.batching.counts import BatchCounts, Candidate, CompletionIndex, count_batch
from penstock_trainer.batching.masking import num_trained_tokens
from penstock_trainer.batching.paths import loss_places, trained_paths
from penstock_trainer.batching.reward_columns import AS_SCORED, Column, RewardScale, function_columns
from penstock_trainer.batching.routes import Experts, Routes, group_routes, routes_of
from penstock_trainer.grpo import (
    Aggregation,
    Baseline,
    Scale,
    Whitening,
    advantages,
    overlong_penalty,
    sequence_weight,
    whitened,
)

MIN_VALID = 2  # a group's mean and standard deviation need two rewards


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion, or one path of an episode, to train on: T tokens after a prompt.

    loss_mask, behaviour, lags: of length T; advantage and weight: of every loss token.
    lags: versions from the sampler's weights to those under training. index: all samples of an episode have the same;
    advantage and weight are of the episode too. path: which of its trajectory's `trained_paths` it is.
    routes: the experts that the engine chose, if they are to be replayed. teacher: of each loss token, the
    log-probability that a teacher's server gave; None without one.
    """

    prompt_ids: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    behaviour: npt.NDArray[np.float32]
    lags: npt.NDArray[np.int32]
    advantage: float
    weight: float
    index: CompletionIndex
    path: int = 0
    routes: Routes | None = None
    teacher: npt.NDArray[np.float32] | None = None

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @property
    def num_usable_tokens(self) -> int:
        """Loss tokens whose behaviour log-probability is finite: the others have no loss."""
        return int(np.count_nonzero(self.loss_mask & np.isfinite(self.behaviour)))


@dataclass(frozen=True)
class Overlong:
    """The overlong penalty: see `penstock_trainer.grpo.overlong_penalty`."""

    max_new_tokens: int
    buffer_tokens: int = 0
    penalty: float = 1.0


@dataclass(frozen=True)
class Truncated:
    """What becomes of a trajectory that a limit on its length ended.

    leave_out: none of its tokens has a loss, as if its loss_mask were 0. So the mean over tokens does not count them,
    the mean over completions counts it as 0, and its reward stays in baseline and scale. zero: its reward is 0.
    penalty: its reward is lower by `penalty`. A reward that failed stays a failure.
    """

    treatment: Literal["train", "leave_out", "zero", "penalty"] = "train"
    penalty: float = 1.0

    def leaves_out(self, trajectory: Trajectory) -> bool:
        """Whether it has no loss."""
        return self.treatment == "leave_out" and trajectory.is_truncated

    def reward_of(self, trajectory: Trajectory, reward: float) -> float:
        """The reward, as shaped."""
        if not trajectory.is_truncated or self.treatment in ("train", "leave_out"):
            return reward
        return 0.0 if self.treatment == "zero" else reward - self.penalty


@dataclass(frozen=True)
class BatchRules:
    """How rewards become advantages and weights.

    reward_scale: of each reward, before penalties. tolerance: shaped rewards that differ by no more are equal.
    own_advantages: the user's, in place of baseline and scale:
    (rewards float64[B, G], is_valid bool[B, G]) -> float[B, G]. by_function: weights of the reward functions that have
    an advantage each, of which the completion's is the sum; empty: the advantage is that of the reward.
    with_zero_advantage: completions without an advantage need a forward pass too, because another term has a gradient.
    router_replay: samples have the experts that the engine chose, if their group has them. served_teacher: samples have
    the log-probabilities that a teacher's server gave, which their group must have.
    """

    overlong: Overlong
    truncated: Truncated = Truncated()
    reward_scale: RewardScale = AS_SCORED
    baseline: Baseline = "group"
    scale: Scale = "group"
    eps: float = 1e-6
    tolerance: float = 0.0
    whitening: Whitening = "none"
    own_advantages: Callable[[Tensor, Tensor], Tensor] | None = None
    by_function: Mapping[str, float] = field(default_factory=dict)
    aggregation: Aggregation = "seq-mean-token-sum"
    norm_length: int = 1
    num_minibatches: int = 1
    with_zero_advantage: bool = False
    router_replay: bool = False
    served_teacher: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples in the order of their groups, by mini-batch; the counts and all advantages of the full batch."""

    minibatches: tuple[tuple[Sample, ...], ...]
    counts: BatchCounts
    advantages: Mapping[CompletionIndex, float]

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for minibatch in self.minibatches for sample in minibatch)


def num_valid(group: ScoredGroup) -> int:
    """Trajectories that did not fail."""
    return sum(reward is not None for reward in rewards_of(group))


def shaped_rewards(group: ScoredGroup, rules: BatchRules) -> Column:
    """The group's rewards: scaled and clipped, then with the overlong penalty and what is made of cut completions.

    None if a reward failed.
    """
    return [
        None if reward is None else rules.truncated.reward_of(each, reward) + _penalty(each, rules.overlong)
        for reward, each in zip(rules.reward_scale.column(group), group.group.trajectories, strict=True)
    ]


def valid_samples(groups: Sequence[ScoredGroup], *, version: int) -> list[Sample]:
    """All trajectories with a reward and a loss token, without advantage or weight."""
    samples: list[Sample] = []
    for b, group in enumerate(groups):
        prompt_ids = _prompt_ids(group)
        for g, (each, reward) in enumerate(zip(group.group.trajectories, rewards_of(group), strict=True)):
            if reward is not None and each.num_loss_tokens:
                index = CompletionIndex(b, g)
                samples += _samples(each, prompt_ids, index, version=version, advantage=0.0, weight=0.0)
    return samples


def make_batch(
    groups: Sequence[ScoredGroup],
    rules: BatchRules,
    *,
    version: int,
    max_lag: int | None = None,
    penalties: Mapping[tuple[int, int], float] | None = None,
) -> Batch:
    """Advantages and weights of all groups; samples are what needs a forward pass.

    version: of the weights under training. max_lag: tokens that lag more versions are masked (`masking`).
    penalties: subtracted from rewards, by `CompletionIndex` (a KL term in the reward).
    A trajectory whose reward failed is never a sample. One whose advantage is 0 is a sample only if
    `rules.with_zero_advantage`. One whose loss tokens are all masked, or that is left out, is not. They count in the
    denominators, but for the tokens of one that is left out.
    """
    counted = [b for b, group in enumerate(groups) if num_valid(group) >= MIN_VALID]
    candidates: list[list[Candidate]] = []
    for b, values_G in zip(counted, _advantages(groups, counted, rules, penalties or {}), strict=True):
        pairs = zip(groups[b].group.trajectories, rewards_of(groups[b]), strict=True)
        candidates.append(
            [
                _candidate(each, CompletionIndex(b, g), values_G[g], rules.truncated, version, max_lag)
                for g, (each, reward) in enumerate(pairs)
                if reward is not None
            ]
        )
    minibatches = [
        tuple(_minibatch(groups, part, rules, version, max_lag)) for part in _parts(candidates, rules.num_minibatches)
    ]
    advantages = {each.index: each.advantage for group in candidates for each in group}
    shaped = [reward for group in groups for reward in shaped_rewards(group, rules) if reward is not None]
    counts = count_batch(groups, candidates, shaped, rules.reward_scale, rules.tolerance, rules.by_function)
    return Batch(tuple(minibatches), counts, advantages)


def _candidate(
    trajectory: Trajectory,
    index: CompletionIndex,
    advantage: float,
    truncated: Truncated,
    version: int,
    max_lag: int | None,
) -> Candidate:
    left_out = truncated.leaves_out(trajectory)
    return Candidate(
        index=index,
        trajectory=trajectory,
        advantage=advantage,
        num_loss_tokens=0 if left_out else trajectory.num_loss_tokens,
        num_trained_tokens=0 if left_out else num_trained_tokens(trajectory, version, max_lag),
    )


def _penalty(trajectory: Trajectory, overlong: Overlong) -> float:
    return overlong_penalty(
        trajectory.num_tokens,
        max_new_tokens=overlong.max_new_tokens,
        buffer_tokens=overlong.buffer_tokens,
        penalty=overlong.penalty,
    )


def _advantages(
    groups: Sequence[ScoredGroup], counted: list[int], rules: BatchRules, penalties: Mapping[tuple[int, int], float]
) -> list[list[float]]:
    """[B][G] of the counted groups; 0 if a reward failed, and behind the end of a group smaller than others."""
    if not counted:
        return []
    width = max(len(groups[b].scores) for b in counted)
    if rules.by_function:
        columns = [function_columns(groups[b], rules.by_function) for b in counted]
        nothing: list[float | None] = []
        advantages_BG = torch.zeros(len(counted), width)
        for name, weight in rules.by_function.items():
            rows = [each.get(name, nothing) for each in columns]
            advantages_BG += weight * _of_rows(rows, width, rules)
    else:
        rows = [_penalized(groups[b], b, rules, penalties) for b in counted]
        advantages_BG = _of_rows(rows, width, rules)
    if rules.whitening != "none":
        valid = [[reward is not None for reward in rewards_of(groups[b])] for b in counted]
        counts_BG = _padded(valid, width)
        if rules.whitening == "tokens":
            counts_BG *= _padded([_loss_tokens(groups[b], rules.truncated) for b in counted], width)
        advantages_BG = whitened(advantages_BG, torch.from_numpy(counts_BG), eps=rules.eps)
    values_BG: list[list[float]] = advantages_BG.tolist()
    return values_BG


def _loss_tokens(group: ScoredGroup, truncated: Truncated) -> list[int]:
    return [0 if truncated.leaves_out(each) else each.num_loss_tokens for each in group.group.trajectories]


def _penalized(
    group: ScoredGroup, b: int, rules: BatchRules, penalties: Mapping[tuple[int, int], float]
) -> list[float | None]:
    return [
        None if reward is None else reward - penalties.get((b, g), 0.0)
        for g, reward in enumerate(shaped_rewards(group, rules))
    ]


def _of_rows(rows: Sequence[Sequence[float | None]], width: int, rules: BatchRules) -> Tensor:
    """float32[B, width]: advantages of one number a completion; 0 where there is none."""
    rewards_BG = torch.from_numpy(_padded([[value or 0.0 for value in row] for row in rows], width))
    valid_BG = torch.from_numpy(_padded([[value is not None for value in row] for row in rows], width)) > 0
    if rules.own_advantages is not None:
        return torch.where(valid_BG, rules.own_advantages(rewards_BG, valid_BG), 0.0).float()
    return advantages(
        rewards_BG, valid_BG, baseline=rules.baseline, scale=rules.scale, eps=rules.eps, tolerance=rules.tolerance
    )


def _padded(rows: Sequence[Sequence[float]], width: int) -> npt.NDArray[np.float64]:
    """[B, width]; 0 behind the end of a row."""
    padded_BG = np.zeros((len(rows), width), dtype=np.float64)
    for number, row in enumerate(rows):
        padded_BG[number, : len(row)] = row
    return padded_BG


def _parts(candidates: list[list[Candidate]], num_parts: int) -> list[list[list[Candidate]]]:
    """Consecutive parts of nearly equally many groups; fewer if there are fewer groups."""
    num_groups = len(candidates)
    count = min(num_parts, num_groups)
    bounds = [num_groups * part // count for part in range(count + 1)] if count else []
    return [candidates[start:end] for start, end in pairwise(bounds)]


def _minibatch(
    groups: Sequence[ScoredGroup],
    candidates: Sequence[Sequence[Candidate]],
    rules: BatchRules,
    version: int,
    max_lag: int | None,
) -> Iterator[Sample]:
    """The samples of some groups, weighted by the counts of these groups."""
    num_tokens = sum(each.num_loss_tokens for group in candidates for each in group)
    for group in candidates:
        scored = groups[group[0].index.group]
        rollout = scored.group
        prompt_ids = _prompt_ids(scored)
        prompt_routes = group_routes(rollout) if rules.router_replay else None
        for each in group:
            if not each.num_trained_tokens or not (each.advantage or rules.with_zero_advantage):
                continue
            weight = sequence_weight(
                rules.aggregation,
                num_groups=len(candidates),
                num_valid_in_group=len(group),
                num_tokens=each.num_loss_tokens,
                num_tokens_in_batch=num_tokens,
                norm_length=rules.norm_length,
            )
            yield from _samples(
                each.trajectory,
                prompt_ids,
                each.index,
                version=version,
                max_lag=max_lag,
                advantage=each.advantage,
                weight=weight,
                prompt_routes=prompt_routes,
                teacher=_teacher_logprobs(scored, each.index.completion) if rules.served_teacher else None,
            )


def _teacher_logprobs(scored: ScoredGroup, g: int) -> npt.NDArray[np.float32]:
    """Of each sampled token of a trajectory. ValueError if the group has none: the judge holds no such group."""
    if not scored.is_taught:
        raise ValueError(
            f"the group of ticket {scored.group.ticket.key} has no log-probabilities of a teacher: expected those that "
            "the reward service asks of teacher.urls"
        )
    return np.frombuffer(scored.teacher_logprobs[g], dtype="<f4")


def _prompt_ids(group: ScoredGroup) -> npt.NDArray[np.int32]:
    """One array for all completions of a group; empty for episodes."""
    return np.frombuffer(group.group.ticket.prompt_ids, dtype="<i4")


def _samples(
    trajectory: Trajectory,
    prompt_ids: npt.NDArray[np.int32],
    index: CompletionIndex,
    *,
    version: int,
    max_lag: int | None = None,
    advantage: float,
    weight: float,
    prompt_routes: Experts | None = None,
    teacher: npt.NDArray[np.float32] | None = None,
) -> Iterator[Sample]:
    routes = routes_of(trajectory, prompt_routes)
    places = None if teacher is None else loss_places(trajectory, version, max_lag)
    for number, path in enumerate(trained_paths(trajectory, prompt_ids, version, max_lag)):
        own = None if teacher is None or places is None else teacher[next(places)]
        yield Sample(*path, advantage=advantage, weight=weight, index=index, path=number, routes=routes, teacher=own)
