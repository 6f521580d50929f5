"""Estimators of the KL divergence from the reference."""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_ratio_N: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(pi || reference), from log_ratio = l - l_r; x = l_r - l = -log_ratio.

    k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x (Schulman, joschu.net/blog/kl-approx.html; k3 as in DeepSeekMath,
    equation 4). For samples of pi k1 and k3 are unbiased; k2 is biased, but has the gradient of the divergence. In the
    loss the gradient of k1 alone is that of l, whose mean is 0. Deviation: tokens come from the behaviour policy;
    multiply by w = exp(l - l_b), with its gradient, for an unbiased estimate (DeepSeek-V3.2, arXiv 2512.02556).
    """
    if estimator == "k1":
        return log_ratio_N
    if estimator == "k2":
        return log_ratio_N.square() / 2
    return torch.expm1(-log_ratio_N) + log_ratio_N
