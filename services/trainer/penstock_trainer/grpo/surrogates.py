"""Surrogates: the loss of a token, given its log-ratio to the anchor.

Each takes (tokens, log_ratio_N, mask_N) and parameters by name, and returns `Terms`. log_ratio_N = l - l_anchor,
clamped, 0 where masked; only l has a gradient. Two kinds: a clipped ratio whose own gradient is used (PPO, SAPO), and a
weight without a gradient times l (GSPO, CISPO, DPPO, VESPO, REINFORCE).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock_trainer.grpo.tokens import MAX_LOG_RATIO, Tokens

MIN_LOG_WEIGHT = -18.420680743952367  # ln 1e-8, VESPO's lower bound
LARGEST_LOGPROB = -1e-12  # keeps log(1 - p) finite if p rounds to 1
MAX_DPPO_WEIGHT = 20.0  # the paper's truncation of w


@dataclass(frozen=True)
class Terms:
    """Losses per token, and which tokens were limited because their ratio had become too low or too high: bool[N]."""

    loss_N: Tensor
    low_N: Tensor
    high_N: Tensor


class Surrogate(Protocol):
    """One of the functions below with its parameters bound."""

    def __call__(self, tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor) -> Terms: ...


def ppo_clip(
    tokens: Tokens,
    log_ratio_N: Tensor,
    mask_N: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> Terms:
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), and for A < 0 not above -dual_clip A.

    PPO (arXiv 1707.06347), equation 7; eps_high > eps_low is DAPO's clip-higher (arXiv 2503.14476), dual_clip > 1 that
    of arXiv 1912.09729. Deviation: without proximal log-probabilities l_anchor is the behaviour policy as the sampler
    recorded it, not a recomputation by the trainer, so that r also corrects for the sampler's numerics and staleness.
    """
    ratio_N, advantage_N = log_ratio_N.exp(), tokens.advantage_N
    loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - eps_low, 1 + eps_high) * advantage_N)
    low_N = (ratio_N < 1 - eps_low) & (advantage_N < 0)
    high_N = (ratio_N > 1 + eps_high) & (advantage_N > 0)
    if dual_clip is not None:
        loss_N = torch.where(advantage_N < 0, torch.minimum(loss_N, -dual_clip * advantage_N), loss_N)
        high_N = high_N | ((ratio_N > dual_clip) & (advantage_N < 0))
    return Terms(loss_N, low_N & mask_N, high_N & mask_N)


def gspo(tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor, *, eps_low: float, eps_high: float) -> Terms:
    """-min(s_t A, clip(s_t) A) with s_t = sg(s) exp(l - sg l), s = exp(mean_t (l - l_anchor)) of the completion.

    GSPO (arXiv 2507.18071), equations 7 and 13: one ratio for all tokens of a completion. Made for seq-mean-token-mean.
    """
    mean_S = tokens.mean_by_sequence(log_ratio_N.detach(), mask_N)
    own_N = torch.where(mask_N, tokens.logprobs_N, 0.0)
    log_s_N = tokens.spread(mean_S).to(log_ratio_N.dtype) + (own_N - own_N.detach())
    return ppo_clip(tokens, log_s_N, mask_N, eps_low=eps_low, eps_high=eps_high)


def cispo(tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor, *, eps_low: float, eps_high: float) -> Terms:
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A l: the weight is clipped, and every token keeps its gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585), equation 4; eps_low = 1 leaves the lower side open.
    """
    ratio_N = log_ratio_N.detach().exp()
    low_N, high_N = ratio_N < 1 - eps_low, ratio_N > 1 + eps_high
    loss_N = _weighted(tokens, mask_N, ratio_N.clamp(1 - eps_low, 1 + eps_high))
    return Terms(loss_N, low_N & mask_N, high_N & mask_N)


def sapo(
    tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Terms:
    """-(4 / tau) sigmoid(tau (r - 1)) A: a soft gate instead of a clip, with gradient -A at r = 1.

    SAPO (arXiv 2511.20347), equations 4 and 5: tau is `tau_positive` if A > 0, else `tau_negative`.
    """
    tau_N = _choice(tokens.advantage_N > 0, tau_positive, tau_negative, log_ratio_N)
    loss_N = -(4 / tau_N) * torch.sigmoid(tau_N * (log_ratio_N.exp() - 1)) * tokens.advantage_N
    return Terms(loss_N, *_none(mask_N))


def dppo_tv(tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor, *, low: float, high: float) -> Terms:
    """-A sg(min(w, 20)) l keep, keep = (p - p_b <= high if A > 0 else p - p_b >= -low), p = exp l.

    DPPO with total variation (arXiv 2602.04879): trust is measured in probability, not as a ratio. log_ratio_N must be
    l - l_b.
    """
    probability_N, behaviour_logprobs_N = _probabilities(tokens, mask_N)
    moved_N = probability_N - behaviour_logprobs_N
    too_high_N = (tokens.advantage_N > 0) & (moved_N > high)
    too_low_N = (tokens.advantage_N <= 0) & (moved_N < -low)
    return _kept(tokens, log_ratio_N, mask_N, too_low_N, too_high_N)


def dppo_kl(tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor, *, threshold: float) -> Terms:
    """As `dppo_tv`, but drops tokens if the binary KL of (p_b, p) is above `threshold` and p - p_b has the sign of A.

    DPPO with KL (arXiv 2602.04879): p_b log(p_b / p) + (1 - p_b) log((1 - p_b) / (1 - p)).
    """
    own_N = torch.where(mask_N, tokens.logprobs_N.detach(), -1.0).double().clamp(max=LARGEST_LOGPROB)
    behaviour_logprobs_N = torch.where(mask_N, tokens.behaviour_logprobs_N, -1.0).double().clamp(max=LARGEST_LOGPROB)
    p_b_N = behaviour_logprobs_N.exp()
    rest_N = torch.log(-torch.expm1(behaviour_logprobs_N)) - torch.log(-torch.expm1(own_N))
    far_N = p_b_N * (behaviour_logprobs_N - own_N) + (1 - p_b_N) * rest_N > threshold
    too_high_N = far_N & (tokens.advantage_N > 0) & (own_N > behaviour_logprobs_N)
    too_low_N = far_N & (tokens.advantage_N < 0) & (own_N < behaviour_logprobs_N)
    return _kept(tokens, log_ratio_N, mask_N, too_low_N, too_high_N)


def vespo(
    tokens: Tokens,
    log_ratio_N: Tensor,
    mask_N: Tensor,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Terms:
    """-sg(phi) A l, phi = exp(lam + k log W - lam W), log W = clamp(sum_t (l - l_b), ln 1e-8, 20) of the completion.

    VESPO: a smooth kernel of the completion's importance weight, 1 at W = 1, instead of a truncation. (k, lam) is
    `positive` for A >= 0, else `negative`. log_ratio_N must be l - l_b, each term of the sum clamped to +-20.
    """
    log_w_S = tokens.sum_by_sequence(log_ratio_N.detach()).clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    log_w_N = tokens.spread(log_w_S)
    gains_N = _choice(tokens.advantage_N >= 0, positive[0], negative[0], log_w_N)
    lambdas_N = _choice(tokens.advantage_N >= 0, positive[1], negative[1], log_w_N)
    phi_N = (lambdas_N + gains_N * log_w_N - lambdas_N * log_w_N.exp()).exp().to(log_ratio_N.dtype)
    return Terms(_weighted(tokens, mask_N, phi_N), *_none(mask_N))


def reinforce(tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor) -> Terms:
    """-A l: the plain policy gradient. Off-policy it needs a correction."""
    return Terms(_weighted(tokens, mask_N, torch.ones_like(log_ratio_N)), *_none(mask_N))


def _choice(condition_N: Tensor, yes: float, no: float, like_N: Tensor) -> Tensor:
    """[N] of `yes` and `no`, in the type of like_N."""
    return torch.where(condition_N, torch.full_like(like_N, yes), torch.full_like(like_N, no))


def _weighted(tokens: Tokens, mask_N: Tensor, weight_N: Tensor) -> Tensor:
    return -weight_N * tokens.advantage_N * torch.where(mask_N, tokens.logprobs_N, 0.0)


def _kept(tokens: Tokens, log_ratio_N: Tensor, mask_N: Tensor, low_N: Tensor, high_N: Tensor) -> Terms:
    weight_N = torch.where(low_N | high_N, 0.0, log_ratio_N.detach().exp().clamp(max=MAX_DPPO_WEIGHT))
    return Terms(_weighted(tokens, mask_N, weight_N), low_N & mask_N, high_N & mask_N)


def _probabilities(tokens: Tokens, mask_N: Tensor) -> tuple[Tensor, Tensor]:
    own_N = torch.where(mask_N, tokens.logprobs_N.detach(), 0.0)
    return own_N.exp(), torch.where(mask_N, tokens.behaviour_logprobs_N, 0.0).exp()


def _none(mask_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(mask_N), torch.zeros_like(mask_N)
