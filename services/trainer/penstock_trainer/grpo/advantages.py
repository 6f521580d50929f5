"""Advantages: rewards, as shaped, minus a baseline, over a scale.

Invariants: a completion that is not valid (its reward failed) gets 0 and never enters a mean or a deviation; rewards
that are all equal, to a tolerance, give exactly 0 if the baseline is their mean: never the noise of a rounded mean,
never nan.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["group", "batch", "leave_one_out", "none"]
Scale = Literal["group", "batch", "mean", "none"]
Whitening = Literal["none", "completions", "tokens"]


def overlong_penalty(num_tokens: int, *, max_new_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """What to add to the reward of a completion of `num_tokens` tokens: 0 down to -penalty over the last tokens.

    DAPO (arXiv 2503.14476), equation 13: 0 up to max_new_tokens - buffer, then linear, -penalty at max_new_tokens.
    `buffer_tokens` 0 switches it off. Deviation: the paper's penalty is 1.
    """
    if not buffer_tokens:
        return 0.0
    excess = num_tokens - (max_new_tokens - buffer_tokens)
    return -penalty * min(max(excess, 0) / buffer_tokens, 1.0)


def varies(rewards: Sequence[float | None], tolerance: float = 0.0) -> bool:
    """Whether the valid rewards of a group differ by more than the tolerance.

    If they do not, no completion has an advantage over their mean.
    """
    valid = [reward for reward in rewards if reward is not None]
    return bool(valid) and max(valid) - min(valid) > tolerance


def advantages(
    rewards_BG: Tensor,
    valid_BG: Tensor,
    *,
    baseline: Baseline,
    scale: Scale,
    eps: float,
    tolerance: float = 0.0,
) -> Tensor:
    """float32[B, G]: (R - baseline) / scale; 0 if the rewards that the baseline is the mean of are equal.

    They are if they differ by no more than `tolerance`, which no paper has: a scale would make noise as large as any
    other difference.

    | Name | baseline | scale | Source |
    | --- | --- | --- | --- |
    | GRPO | group | group | DeepSeekMath (arXiv 2402.03300), below equation 3 |
    | Dr. GRPO | group | none | arXiv 2503.20783, section 3.2 |
    | RLOO | leave_one_out | none | arXiv 2402.14740, equation 7: R - mean of the others |
    | Lite PPO, REINFORCE++ baseline | group | batch | arXiv 2508.08221: group mean, batch deviation |
    | MaxRL | group | mean | (R - mean) / mean(abs(R)), which is (R - mean) / mean for the rewards of 0 and more |
    | REINFORCE | none or batch | none | R, or R - mean of the batch |

    The deviation is that of the rewards over all valid completions of the group or batch, plus `eps`. Choices:
    * it divides by n - 1, as TRL and verl do; the papers leave it open;
    * leave-one-out of a group with one valid completion is 0: there are no others;
    * MaxRL is defined for rewards that are not negative. The mean of absolute values extends it: no advantage is larger
      than n - 1 for any rewards, while the plain mean can be close to 0 or negative.
    A scale bounds the distance from a baseline in these pairs, in leave_one_out with group or batch, and in batch with
    batch. In others equal rewards are divided by `eps` alone: the configuration refuses them. Sums are float64.
    """
    rewards_BG = torch.where(valid_BG, rewards_BG.double(), 0.0)
    centred_BG = torch.where(valid_BG, rewards_BG - _baseline(rewards_BG, valid_BG, baseline), 0.0)
    scaled_BG = centred_BG / _scale(rewards_BG, valid_BG, scale, eps)
    return torch.where(_no_gradient(rewards_BG, valid_BG, baseline, tolerance), 0.0, scaled_BG).float()


def whitened(advantages_BG: Tensor, counts_BG: Tensor, *, eps: float) -> Tensor:
    """float32[B, G]: (A - mean) / (deviation + eps) over the batch, of which each advantage is there `counts` times.

    | Name | A | counts | Source |
    | --- | --- | --- | --- |
    | REINFORCE++ | R | tokens | arXiv 2501.03262: mean and deviation over all tokens of the global batch |
    | REINFORCE++ baseline | R - mean of the group | tokens | the same |
    | GDPO | sum of advantages, each of one reward | completions | arXiv 2601.05242 |

    counts_BG: float64, 0 for a completion that is not valid. The deviation divides by the sum of counts - 1, as verl
    does. Advantages that are all equal give exactly 0. Deviation: the KL term of REINFORCE++ is one of each token, with
    the sum of those after it; here the completion has one (`kl_penalties`). Sums are float64.
    """
    is_there_BG = counts_BG > 0
    if not is_there_BG.any():
        return torch.zeros_like(advantages_BG, dtype=torch.float32)
    values_BG = torch.where(is_there_BG, advantages_BG.double(), 0.0)
    total = counts_BG.sum()
    centred_BG = torch.where(is_there_BG, values_BG - (counts_BG * values_BG).sum() / total, 0.0)
    deviation = ((counts_BG * centred_BG.square()).sum() / (total - 1).clamp(min=1)).sqrt()
    own = values_BG[is_there_BG]
    return torch.zeros_like(centred_BG).float() if own.max() <= own.min() else (centred_BG / (deviation + eps)).float()


def _baseline(rewards_BG: Tensor, valid_BG: Tensor, baseline: Baseline) -> Tensor:
    if baseline == "none":
        return torch.zeros_like(rewards_BG)
    if baseline == "batch":
        return rewards_BG.sum() / valid_BG.sum().clamp(min=1)
    num_B1 = valid_BG.sum(1, keepdim=True)
    sum_B1 = rewards_BG.sum(1, keepdim=True)
    if baseline == "group":
        return sum_B1 / num_B1.clamp(min=1)
    return (sum_B1 - rewards_BG) / (num_B1 - 1).clamp(min=1)


def _scale(rewards_BG: Tensor, valid_BG: Tensor, scale: Scale, eps: float) -> Tensor:
    if scale == "none":
        return torch.ones_like(rewards_BG)
    num_B1 = valid_BG.sum(1, keepdim=True).double()
    mean_B1 = rewards_BG.sum(1, keepdim=True) / num_B1.clamp(min=1)
    if scale == "mean":
        size_B1 = rewards_BG.abs().sum(1, keepdim=True) / num_B1.clamp(min=1)
        return torch.where(size_B1 > 0, size_B1, torch.inf)
    if scale == "batch":
        num_B1, mean_B1 = valid_BG.sum().double(), rewards_BG.sum() / valid_BG.sum().clamp(min=1)
    squares_BG = torch.where(valid_BG, rewards_BG - mean_B1, 0.0).square()
    sum_B1 = squares_BG.sum() if scale == "batch" else squares_BG.sum(1, keepdim=True)
    return (sum_B1 / (num_B1 - 1).clamp(min=1)).sqrt() + eps


def _no_gradient(rewards_BG: Tensor, valid_BG: Tensor, baseline: Baseline, tolerance: float) -> Tensor:
    """bool[B or 1, 1]: True if the valid rewards, whose mean the baseline is, are equal."""
    dims = (0, 1) if baseline == "batch" else (1,)
    highest = torch.where(valid_BG, rewards_BG, -torch.inf).amax(dims, keepdim=True)
    lowest = torch.where(valid_BG, rewards_BG, torch.inf).amin(dims, keepdim=True)
    return torch.zeros_like(highest, dtype=torch.bool) if baseline == "none" else highest - lowest <= tolerance
