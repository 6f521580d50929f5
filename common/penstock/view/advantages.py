"""Advantages as the trainer computes them, from recorded rewards: for readers, in pure Python.

The trainer computes them with torch, which a reader does not import: `penstock_trainer.grpo.advantages` has the formula
with its sources, and a test holds both equal for every baseline and scale.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of

MIN_VALID = 2  # a group's mean and standard deviation need two rewards

Rewards = Sequence[float | None]


def advantages_of(groups: Sequence[ScoredGroup], settings: Mapping[str, Any]) -> list[list[float | None]] | None:
    """Of each completion of a step's groups; None: it has none. None in place of all: files do not tell.

    settings: of the step, by key. A KL term in the reward, and a function of the user's, are parts of the advantage
    that no file records; those of each reward function only the trainer computes.
    """
    names = ("loss.advantage.baseline", "loss.advantage.scale", "loss.advantage.eps")
    if any(name not in settings for name in names):
        return None
    if settings.get("loss.advantage.function") or settings.get("loss.advantage.by_function"):
        return None
    if settings.get("loss.kl.place") == "reward" and settings.get("kl_ctl", 0) > 0:
        return None
    baseline, scale, eps = (settings[name] for name in names)
    shaped = [shaped_rewards(group, settings) for group in groups]
    counted = [rewards for rewards in shaped if len(_valid(rewards)) >= MIN_VALID]
    tolerance = settings.get("loss.advantage.tolerance", 0.0)
    found = advantages(counted, baseline=baseline, scale=scale, eps=eps, tolerance=tolerance)
    whitening = settings.get("loss.advantage.whitening", "none")
    if whitening != "none":
        pairs = zip(groups, shaped, strict=True)
        lengths = [_lengths(group, settings) for group, rewards in pairs if len(_valid(rewards)) >= MIN_VALID]
        found = whitened(found, lengths if whitening == "tokens" else None, eps=eps)
    values = iter(found)
    return [next(values) if len(_valid(each)) >= MIN_VALID else [None] * len(each) for each in shaped]


def shaped_rewards(group: ScoredGroup, settings: Mapping[str, Any]) -> Rewards:
    """What the advantages of a group's completions are made of; None for one that failed.

    Scaled and clipped, then with the overlong penalty (DAPO, arXiv 2503.14476, equation 13), or what is made of
    truncated completions. A KL term in the reward is not part of it.
    """
    scale, clip = settings.get("reward.scale", 1.0), settings.get("reward.clip")
    low, high = clip or (-math.inf, math.inf)
    scaled = [None if reward is None else min(max(scale * reward, low), high) for reward in rewards_of(group)]
    pairs = zip(scaled, group.group.trajectories, strict=True)
    truncated = settings.get("loss.truncated", "train")
    if truncated in ("zero", "penalty"):
        kept, taken = (0.0, 0.0) if truncated == "zero" else (1.0, settings["loss.truncated_penalty"])
        return [kept * reward - taken if reward is not None and each.is_truncated else reward for reward, each in pairs]
    buffer = settings.get("loss.overlong.buffer_tokens", 0)
    if not buffer:
        return scaled
    allowed, penalty = settings["sampling.max_new_tokens"] - buffer, settings["loss.overlong.penalty"]
    return [
        None if reward is None else reward - penalty * min(max(each.num_tokens - allowed, 0) / buffer, 1.0)
        for reward, each in pairs
    ]


def advantages(
    groups: Sequence[Rewards], *, baseline: str, scale: str, eps: float, tolerance: float = 0.0
) -> list[list[float | None]]:
    """(reward - baseline) / scale of each reward of the groups of one batch; None for one that failed."""
    batch = [reward for group in groups for reward in _valid(group)]

    def of(group: Rewards) -> list[float | None]:
        valid = _valid(group)
        compared = batch if baseline == "batch" else valid
        if baseline != "none" and max(compared) - min(compared) <= tolerance:
            return [None if reward is None else 0.0 for reward in group]
        return [None if reward is None else _advantage(reward, valid, batch, baseline, scale, eps) for reward in group]

    return [of(group) for group in groups]


def whitened(
    groups: Sequence[Rewards], lengths: Sequence[Sequence[int]] | None, *, eps: float
) -> list[list[float | None]]:
    """(A - mean) / (deviation + eps) over all advantages, or over all tokens; lengths: loss tokens of each."""
    counts = lengths or [[1] * len(group) for group in groups]
    pairs = [
        (value, count)
        for group, row in zip(groups, counts, strict=True)
        for value, count in zip(group, row, strict=True)
        if value is not None and count
    ]
    if len({value for value, _ in pairs}) <= 1:
        return [[None if value is None else 0.0 for value in group] for group in groups]
    total = sum(count for _, count in pairs)
    mean = math.fsum(value * count for value, count in pairs) / total
    deviation = math.sqrt(math.fsum(count * (value - mean) ** 2 for value, count in pairs) / max(total - 1, 1))
    return [
        [
            None if value is None else (value - mean) / (deviation + eps) if count else 0.0
            for value, count in zip(group, row, strict=True)
        ]
        for group, row in zip(groups, counts, strict=True)
    ]


def _lengths(group: ScoredGroup, settings: Mapping[str, Any]) -> list[int]:
    leaves_out = settings.get("loss.truncated") == "leave_out"
    return [0 if leaves_out and each.is_truncated else each.num_loss_tokens for each in group.group.trajectories]


def _advantage(
    reward: float, group: Sequence[float], batch: Sequence[float], baseline: str, scale: str, eps: float
) -> float:
    return (reward - _baseline(reward, group, batch, baseline)) / _scale(group, batch, scale, eps)


def _baseline(reward: float, group: Sequence[float], batch: Sequence[float], baseline: str) -> float:
    if baseline == "none":
        return 0.0
    if baseline == "leave_one_out":
        return (math.fsum(group) - reward) / max(len(group) - 1, 1)
    values = batch if baseline == "batch" else group
    return math.fsum(values) / len(values)


def _scale(group: Sequence[float], batch: Sequence[float], scale: str, eps: float) -> float:
    if scale == "none":
        return 1.0
    if scale == "mean":
        return math.fsum(map(abs, group)) / len(group) or math.inf
    values = batch if scale == "batch" else group
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((each - mean) ** 2 for each in values) / max(len(values) - 1, 1)) + eps


def _valid(rewards: Rewards) -> list[float]:
    return [reward for reward in rewards if reward is not None]
