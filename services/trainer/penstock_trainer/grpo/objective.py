"""The loss of a micro-batch, put together from an objective's parts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock_trainer.grpo.corrections import Correction
from penstock_trainer.grpo.kl import Estimator, kl_estimate
from penstock_trainer.grpo.proximal import Proximal, approximate_proximal
from penstock_trainer.grpo.statistics import Sums, token_sums
from penstock_trainer.grpo.surrogates import Surrogate
from penstock_trainer.grpo.tokens import Tokens, log_ratio, usable


@dataclass(frozen=True)
class KlTerm:
    """kl_ctl * estimator(l, l_r) in the loss; `importance_weighted` multiplies it by w = exp(l - l_b)."""

    kl_ctl: float
    estimator: Estimator = "k3"
    importance_weighted: bool = False


@dataclass(frozen=True)
class Objective:
    """The parts. Which combinations make sense is checked where the configuration is read (`penstock.config.loss`)."""

    surrogate: Surrogate
    proximal: Proximal = "none"
    correction: Correction = field(default_factory=Correction)
    kl: KlTerm | None = None
    entropy_bonus: float = 0.0


def micro_batch_loss(tokens: Tokens, objective: Objective) -> tuple[Tensor, Sums]:
    """The micro-batch's addend of the loss, and of its statistics.

        loss = sum_N weight * ( rho_hat * surrogate(l - l_old) + kl_ctl * KL(l, l_r) - entropy_bonus * H )

    Defaults (PPO clip, no proximal, no correction, k3, seq-mean-token-sum) give the negative of the source document's

        J = E[ 1/G sum_i sum_t min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL(pi_theta || pi_ref) ]

    Deviations: the KL term is estimated per token and aggregated like the first term (as DeepSeekMath does);
    corrections weigh the surrogate only; masked tokens stay in the denominators.
    """
    mask_N = usable(tokens)
    behaviour_N = torch.where(mask_N, tokens.behaviour_N, 0.0)
    current_N = tokens.logprobs_N.detach()
    start_N = current_N if tokens.start_N is None else tokens.start_N
    anchor_N, corrected_N = _anchors(tokens, objective.proximal, behaviour_N, start_N)
    terms = objective.surrogate(tokens, log_ratio(tokens.logprobs_N, anchor_N, mask_N), mask_N)
    log_rho_N = log_ratio(corrected_N, behaviour_N, mask_N)
    weight_N, dropped = objective.correction(tokens, log_rho_N, mask_N)
    log_w_N = log_ratio(tokens.logprobs_N, behaviour_N, mask_N)
    policy = _aggregate(weight_N * terms.loss_N, tokens.weight_N, mask_N)
    loss, parts = policy, Sums({"loss_policy": float(policy.detach())})
    sums = token_sums(tokens, log_w_N.detach(), mask_N, terms, dropped)
    if objective.kl is not None:
        term, kl_sums = _kl_term(tokens, objective.kl, log_w_N, mask_N)
        loss, parts = loss + term, parts + kl_sums
    if objective.entropy_bonus and tokens.entropy_N is not None:
        bonus = -objective.entropy_bonus * _aggregate(tokens.entropy_N, tokens.weight_N, mask_N)
        loss, parts = loss + bonus, parts + Sums({"loss_entropy": float(bonus.detach())})
    return loss, sums + parts


def _anchors(tokens: Tokens, proximal: Proximal, behaviour_N: Tensor, start_N: Tensor) -> tuple[Tensor, Tensor]:
    """(l_old of the surrogate, l_p of the correction)."""
    if proximal == "none":
        return behaviour_N, start_N
    if proximal == "recomputed":
        return start_N, start_N
    if tokens.lag_N is None:
        raise ValueError("an approximated proximal policy needs lag_N; expected the version of every token")
    approximated_N = approximate_proximal(tokens.logprobs_N, behaviour_N, tokens.lag_N)
    return approximated_N, approximated_N


def _kl_term(tokens: Tokens, kl: KlTerm, log_w_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Sums]:
    if tokens.reference_N is None:
        raise ValueError("a KL term needs reference_N; expected the reference's log-probabilities")
    kl_N = kl_estimate(log_ratio(tokens.logprobs_N, tokens.reference_N, mask_N), kl.estimator)
    sums = Sums({"reference_kl": float(torch.where(mask_N, kl_N.detach(), 0.0).sum(dtype=torch.float64))})
    weighted_N = log_w_N.exp() * kl_N if kl.importance_weighted else kl_N
    term = kl.kl_ctl * _aggregate(weighted_N, tokens.weight_N, mask_N)
    return term, sums + Sums({"loss_kl": float(term.detach())})


def _aggregate(values_N: Tensor, weight_N: Tensor, mask_N: Tensor) -> Tensor:
    """Sum of weight * value over unmasked tokens: the micro-batch's addend of the global mean."""
    return torch.where(mask_N, values_N * weight_N, 0.0).sum()
