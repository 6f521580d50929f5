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

    settings: of the step, by key. A KL term in the reward is a part of the advantage that no file records.
    """
    names = ("loss.advantage.baseline", "loss.advantage.scale", "loss.advantage.eps")
    if any(name not in settings for name in names):
        return None
    if settings.get("loss.kl.place") == "reward" and settings.get("kl_ctl", 0) > 0:
        return None
    baseline, scale, eps = (settings[name] for name in names)
    shaped = [_shaped(group, settings) for group in groups]
    counted = [rewards for rewards in shaped if len(_valid(rewards)) >= MIN_VALID]
    values = iter(advantages(counted, baseline=baseline, scale=scale, eps=eps))
    return [next(values) if len(_valid(each)) >= MIN_VALID else [None] * len(each) for each in shaped]


def _shaped(group: ScoredGroup, settings: Mapping[str, Any]) -> Rewards:
    """With the overlong penalty (DAPO, arXiv 2503.14476, equation 13), or what is made of truncated completions."""
    pairs = zip(rewards_of(group), group.group.trajectories, strict=True)
    truncated = settings.get("loss.truncated", "train")
    if truncated in ("zero", "penalty"):
        kept, taken = (0.0, 0.0) if truncated == "zero" else (1.0, settings["loss.truncated_penalty"])
        return [kept * reward - taken if reward is not None and each.is_truncated else reward for reward, each in pairs]
    buffer = settings.get("loss.overlong.buffer_tokens", 0)
    if not buffer:
        return rewards_of(group)
    allowed, penalty = settings["sampling.max_new_tokens"] - buffer, settings["loss.overlong.penalty"]
    return [
        None if reward is None else reward - penalty * min(max(each.num_tokens - allowed, 0) / buffer, 1.0)
        for reward, each in pairs
    ]


def advantages(groups: Sequence[Rewards], *, baseline: str, scale: str, eps: float) -> list[list[float | None]]:
    """(reward - baseline) / scale of each reward of the groups of one batch; None for one that failed."""
    batch = [reward for group in groups for reward in _valid(group)]
    return [
        [None if reward is None else _advantage(reward, _valid(group), batch, baseline, scale, eps) for reward in group]
        for group in groups
    ]


def _advantage(
    reward: float, group: Sequence[float], batch: Sequence[float], baseline: str, scale: str, eps: float
) -> float:
    compared = batch if baseline == "batch" else group
    if baseline != "none" and max(compared) <= min(compared):
        return 0.0
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
