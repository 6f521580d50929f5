"""The GRPO objective as pure functions over tensors: no config, no services, no I/O.

Everything here sees loss tokens flattened over the completions of one micro-batch. Weights carry the
aggregation, so that micro-batches of any partition, and ranks, add up to the full batch. Called by
the learner; a further objective or correction is another function of the same record.

Shapes: N loss tokens of a micro-batch, B groups, G completions per group.
Notation: l policy, l_b behaviour (from the sampler), l_r reference log-probabilities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is about 5e8: large enough to be clipped, small enough to stay finite when squared


@dataclass(frozen=True)
class Tokens:
    """The loss tokens of one micro-batch; only `logprobs_N` has a gradient.

    logprobs_N: l, after temperature. behaviour_N: l_b as the sampler gave it, possibly not finite.
    advantage_N: of the token's completion. weight_N: its share in the aggregate (`sequence_weight`).
    reference_N: l_r, or None where the objective has no KL term.

    Example, two completions of 2 and 1 tokens in a group of 2: advantage_N = [0.7, 0.7, -0.7],
    weight_N = [0.5, 0.5, 0.5].
    """

    logprobs_N: Tensor
    behaviour_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    reference_N: Tensor | None = None


def group_advantages(rewards_BG: Tensor, valid_BG: Tensor, eps: float) -> Tensor:
    """A_i = (R_i - mean R) / (std R + eps) over the valid completions of each group, float32[B, G].

    DeepSeekMath (arXiv 2402.03300), equation 3 and below. Choices and deviations:
    * std divides by n - 1, as TRL and verl do; the paper does not say;
    * a completion that is not valid (its reward failed) gets 0 and never enters mean or std;
    * equal rewards, or fewer than two valid ones, give exactly 0: never the noise of a rounded mean, never nan.
    """
    rewards = torch.where(valid_BG, rewards_BG.double(), 0.0)
    num_valid_B1 = valid_BG.sum(1, keepdim=True).double()
    mean_B1 = rewards.sum(1, keepdim=True) / num_valid_B1.clamp(min=1)
    centred = torch.where(valid_BG, rewards - mean_B1, 0.0)
    std_B1 = (centred.square().sum(1, keepdim=True) / (num_valid_B1 - 1).clamp(min=1)).sqrt()
    highest_B1 = torch.where(valid_BG, rewards, -torch.inf).amax(1, keepdim=True)
    lowest_B1 = torch.where(valid_BG, rewards, torch.inf).amin(1, keepdim=True)
    varies_B1 = highest_B1 > lowest_B1
    return torch.where(varies_B1, centred / (std_B1 + eps), 0.0).float()


def sequence_weight(num_valid_in_group: int, num_groups: int) -> float:
    """Weight of every token of a completion under seq-mean-token-sum: 1 / (groups * valid completions of its group).

    The source document's E[1/G sum_i sum_t ...]: tokens are summed, completions and groups averaged. Both counts
    are of the whole batch, over all ranks and micro-batches, and include completions that were left out of the
    forward pass because their advantage is 0.
    """
    return 1.0 / (num_groups * num_valid_in_group)


def usable(tokens: Tokens) -> Tensor:
    """bool[N]: tokens whose behaviour log-probability is finite; the others are masked, never taken as on-policy."""
    return torch.isfinite(tokens.behaviour_N)


def log_ratio(logprobs_N: Tensor, other_N: Tensor, mask_N: Tensor) -> Tensor:
    """l - other in float32, clamped to +-20; 0 without a gradient where masked."""
    difference_N = torch.where(mask_N, logprobs_N.float(), 0.0) - torch.where(mask_N, other_N.float(), 0.0)
    return difference_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(log_ratio_N: Tensor, advantage_N: Tensor, eps_clip: float) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) per token, r = exp(log_ratio) = pi_theta / pi_old.

    PPO (arXiv 1707.06347), equation 7, with A of GRPO. Deviation: old is the behaviour policy as the sampler
    recorded it, not a recomputation by the trainer, so that r also corrects for the sampler's numerics and lag.
    """
    ratio_N = log_ratio_N.exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - eps_clip, 1 + eps_clip) * advantage_N)


def kl_k3(log_ratio_N: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || other): exp(x) - 1 - x with x = l_other - l = -log_ratio.

    Schulman's k3 (joschu.net/blog/kl-approx.html), as in DeepSeekMath, equation 4: never negative, unbiased for
    samples of pi. Deviation: samples come from the behaviour policy and are not reweighted.
    """
    return torch.expm1(-log_ratio_N) + log_ratio_N


def aggregate(values_N: Tensor, weight_N: Tensor, mask_N: Tensor) -> Tensor:
    """Sum of weight * value over unmasked tokens: the micro-batch's addend of the global mean."""
    return torch.where(mask_N, values_N * weight_N, 0.0).sum()


@dataclass(frozen=True)
class Sums:
    """Addends of the statistics of a batch; micro-batches and ranks are added, then `Statistics.of`."""

    num_tokens: float = 0.0
    num_non_finite: float = 0.0
    num_clipped: float = 0.0
    behaviour_kl: float = 0.0
    reference_kl: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0
    ratio_min: float = float("inf")
    ratio_max: float = float("-inf")

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            num_tokens=self.num_tokens + other.num_tokens,
            num_non_finite=self.num_non_finite + other.num_non_finite,
            num_clipped=self.num_clipped + other.num_clipped,
            behaviour_kl=self.behaviour_kl + other.behaviour_kl,
            reference_kl=self.reference_kl + other.reference_kl,
            ratio=self.ratio + other.ratio,
            ratio_squared=self.ratio_squared + other.ratio_squared,
            ratio_min=min(self.ratio_min, other.ratio_min),
            ratio_max=max(self.ratio_max, other.ratio_max),
        )


@dataclass(frozen=True)
class Statistics:
    """What a step says about its tokens: those in the forward pass with a finite behaviour log-probability.

    behaviour_kl: mean of exp(x) - 1 - x, x = l - l_b, an estimate of KL(behaviour || policy).
    clipped_ratio: share of tokens whose clipped branch was the smaller one.
    effective_sample_size_ratio: (sum r)^2 / (N sum r^2), 1 when on-policy.
    """

    num_tokens: int
    num_non_finite: int
    behaviour_kl: float
    reference_kl: float
    ratio_min: float
    ratio_mean: float
    ratio_max: float
    clipped_ratio: float
    effective_sample_size_ratio: float

    @classmethod
    def of(cls, sums: Sums) -> "Statistics":
        """The statistics of the added-up sums; without tokens those of an on-policy batch."""
        num_tokens = sums.num_tokens
        if not num_tokens:
            return cls(0, int(sums.num_non_finite), 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0)
        return cls(
            num_tokens=int(num_tokens),
            num_non_finite=int(sums.num_non_finite),
            behaviour_kl=sums.behaviour_kl / num_tokens,
            reference_kl=sums.reference_kl / num_tokens,
            ratio_min=sums.ratio_min,
            ratio_mean=sums.ratio / num_tokens,
            ratio_max=sums.ratio_max,
            clipped_ratio=sums.num_clipped / num_tokens,
            effective_sample_size_ratio=sums.ratio**2 / (num_tokens * sums.ratio_squared),
        )


@torch.no_grad()
def ratio_sums(log_ratio_N: Tensor, advantage_N: Tensor, mask_N: Tensor, eps_clip: float) -> Sums:
    """Addends of the ratio statistics of one micro-batch."""
    x_n = log_ratio_N[mask_N].double()
    advantage_n = advantage_N[mask_N]
    num_non_finite = float(mask_N.numel() - x_n.numel())
    if not x_n.numel():
        return Sums(num_non_finite=num_non_finite)
    ratio_n = x_n.exp()
    clipped_n = ((ratio_n > 1 + eps_clip) & (advantage_n > 0)) | ((ratio_n < 1 - eps_clip) & (advantage_n < 0))
    return Sums(
        num_tokens=float(x_n.numel()),
        num_non_finite=num_non_finite,
        num_clipped=float(clipped_n.sum()),
        behaviour_kl=float((torch.expm1(x_n) - x_n).sum()),
        ratio=float(ratio_n.sum()),
        ratio_squared=float(ratio_n.square().sum()),
        ratio_min=float(ratio_n.min()),
        ratio_max=float(ratio_n.max()),
    )


def grpo_loss(tokens: Tokens, *, eps_clip: float, kl_ctl: float) -> tuple[Tensor, Sums]:
    """The micro-batch's addend of the loss, and of its statistics.

    loss = sum_N weight * ( -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_ctl * k3(l_r - l) ), the negative of

        J = E[ 1/G sum_i sum_t min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL(pi_theta || pi_ref) ]

    Deviation: the KL term is estimated per token and aggregated like the first term (as DeepSeekMath does).
    """
    mask_N = usable(tokens)
    log_ratio_N = log_ratio(tokens.logprobs_N, tokens.behaviour_N, mask_N)
    loss_N = policy_loss(log_ratio_N, tokens.advantage_N, eps_clip)
    sums = ratio_sums(log_ratio_N.detach(), tokens.advantage_N, mask_N, eps_clip)
    if tokens.reference_N is not None:
        reference_kl_N = kl_k3(log_ratio(tokens.logprobs_N, tokens.reference_N, mask_N))
        loss_N = loss_N + kl_ctl * reference_kl_N
        sums += Sums(reference_kl=float(torch.where(mask_N, reference_kl_N.detach(), 0.0).sum(dtype=torch.float64)))
    return aggregate(loss_N, tokens.weight_N, mask_N), sums
