"""The loss of a micro-batch, put together from an objective's parts.

Owns how they are put together, and two of the parts: the proximal policy, from which the surrogate's ratio is measured,
and the estimators of the KL divergence from the reference.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from penstock_trainer.grpo.corrections import Correction, SamplerRatios
from penstock_trainer.grpo.selection import StepSurrogate
from penstock_trainer.grpo.statistics import Sums, token_sums
from penstock_trainer.grpo.step_tokens import StepTokens
from penstock_trainer.grpo.surrogates import Surrogate
from penstock_trainer.grpo.teacher import TeacherTerm, teacher_sums
from penstock_trainer.grpo.tokens import Tokens, log_ratio, usable

Estimator = Literal["k1", "k2", "k3"]
Proximal = Literal["none", "recomputed", "approximated"]


@dataclass(frozen=True)
class KlTerm:
    """kl_ctl * estimator(l, l_r) in the loss; `importance_weighted`: see `kl_estimate`."""

    kl_ctl: float
    estimator: Estimator = "k3"
    importance_weighted: bool = False


@dataclass(frozen=True)
class Objective:
    """The parts. `penstock.config.loss` checks which combinations make sense.

    step_surrogate: what becomes of the surrogate once all tokens of the step are known.
    sampler_kl: weight of (l - l_b)^2 / 2, the k2 estimate of the divergence from the sampler. teacher: makes advantages
    of tokens; None: advantages are of completions.
    """

    surrogate: Surrogate
    proximal: Proximal = "none"
    correction: Correction = field(default_factory=Correction)
    kl: KlTerm | None = None
    sampler_kl: float = 0.0
    entropy_bonus: float = 0.0
    step_surrogate: StepSurrogate | None = None
    teacher: TeacherTerm | None = None

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to be prepared with all tokens of an optimizer step, which costs a pass."""
        return self.step_surrogate is not None or self.correction.depends_on_step

    def prepared(self, step: StepTokens) -> "Objective":
        """The objective of one optimizer step."""
        surrogate = self.surrogate if self.step_surrogate is None else self.step_surrogate(step, self.surrogate)
        return replace(self, surrogate=surrogate, correction=self.correction.prepared(step), step_surrogate=None)

    def step_tokens(self, tokens: Tokens) -> StepTokens:
        """What `prepared` needs of a micro-batch."""
        mask_N = usable(tokens)
        if self.teacher is not None:
            tokens = self.teacher.taught(tokens)
        behaviour_logprobs_N = torch.where(mask_N, tokens.behaviour_logprobs_N, 0.0)
        logprobs_N = tokens.logprobs_N.detach()
        anchor_N = _anchor(tokens, self.proximal, behaviour_logprobs_N)
        log_w_N = log_ratio(logprobs_N, behaviour_logprobs_N, mask_N)
        log_rho_N = log_w_N if self.proximal == "none" else log_ratio(anchor_N, behaviour_logprobs_N, mask_N)
        return StepTokens.of(tokens, log_w_N, self.correction.own_weight(tokens, log_rho_N, mask_N), mask_N)


def kl_estimate(log_ratio_N: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(pi || reference), from log_ratio = l - l_r; x = l_r - l = -log_ratio.

    k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x (Schulman, joschu.net/blog/kl-approx.html; k3 as in DeepSeekMath,
    equation 4). A good estimate need not have the right gradient (arXiv 2510.01555). For tokens of pi, given their
    prefixes, on average:

    | Estimator | value | gradient as a loss | its value as a reward moves the policy by the gradient of |
    | --- | --- | --- | --- |
    | k1 | KL(pi, reference) | 0 | KL(pi, reference) |
    | k2 | not KL | that of KL(pi, reference) | neither divergence; 0 to first order near the reference |
    | k3 | KL(pi, reference) | that of KL(reference, pi) | the difference of both divergences: 0 to first order too |

    Deviation: tokens come from the behaviour policy. A weight w = exp(l - l_b) corrects that: with its gradient for k1
    and k3, which makes value and gradient unbiased (DeepSeek-V3.2, arXiv 2512.02556); sg(w) for k2, which makes its
    gradient unbiased.
    """
    if estimator == "k1":
        return log_ratio_N
    if estimator == "k2":
        return log_ratio_N.square() / 2
    return torch.expm1(-log_ratio_N) + log_ratio_N


def approximate_proximal(logprobs_N: Tensor, behaviour_logprobs_N: Tensor, lag_N: Tensor) -> Tensor:
    """l_b + a (sg l - l_b), a = clamp((v - 1 - v_b) / (v - v_b), 0, 1); a = 0 if v_b >= v.

    A-3PO's interpolation: with lag v - v_b the policy one version ago lies (lag - 1) / lag of the way from the sampler
    to the present policy. lag 1: the behaviour policy itself; large lags: the present policy. It saves the forward pass
    that recomputes l_p.
    """
    lag_N = lag_N.to(logprobs_N.dtype)
    share_N = ((lag_N - 1) / lag_N.clamp(min=1)).clamp(0, 1)
    return behaviour_logprobs_N + share_N * (logprobs_N.detach() - behaviour_logprobs_N)


def micro_batch_loss(tokens: Tokens, objective: Objective) -> tuple[Tensor, Sums]:
    """The micro-batch's addend of the loss, and of its statistics.

        loss = sum_N weight * ( rho_hat * surrogate(l - l_anchor) + kl_ctl * KL(l, l_r)
                                + sampler_kl * (l - l_b)^2 / 2 - entropy_bonus * H )

    Defaults (PPO clip, no proximal, no correction, k3, seq-mean-token-sum) give the negative of the source document's

        J = E[ 1/G sum_i sum_t min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL(pi_theta || pi_ref) ]

    With a teacher A is of the token (`TeacherTerm`).

    Deviations: the KL term is estimated per token and aggregated like the first term (as DeepSeekMath does);
    corrections weigh the surrogate only; masked tokens stay in the denominators. The quadratic term is that of DRO
    (arXiv 2405.19107), there with REINFORCE, and of prime-rl, there with DPPO and a kl_tau of half its weight.
    """
    if objective.step_surrogate is not None:
        raise ValueError("a surrogate depends on all tokens of the step: expected `prepared`")
    mask_N = usable(tokens)
    parts = Sums()
    if objective.teacher is not None:
        parts = teacher_sums(tokens)
        tokens = objective.teacher.taught(tokens)
    behaviour_logprobs_N = torch.where(mask_N, tokens.behaviour_logprobs_N, 0.0)
    anchor_N = _anchor(tokens, objective.proximal, behaviour_logprobs_N)
    terms = objective.surrogate(tokens, log_ratio(tokens.logprobs_N, anchor_N, mask_N), mask_N)
    log_w_N = log_ratio(tokens.logprobs_N, behaviour_logprobs_N, mask_N)
    log_rho_N = log_ratio(anchor_N, behaviour_logprobs_N, mask_N)
    weight_N, dropped = objective.correction(tokens, _ratios(objective.proximal, log_rho_N, log_w_N.detach()), mask_N)
    policy = _aggregate(weight_N * terms.loss_N, tokens.weight_N, mask_N)
    loss, parts = policy, parts + Sums({"loss_policy": float(policy.detach())})
    sums = token_sums(tokens, log_w_N.detach(), mask_N, terms, dropped)
    if objective.kl is not None:
        term, kl_sums = _kl_term(tokens, objective.kl, log_w_N, mask_N)
        loss, parts = loss + term, parts + kl_sums
    if objective.sampler_kl:
        distance = objective.sampler_kl * _aggregate(log_w_N.square() / 2, tokens.weight_N, mask_N)
        loss, parts = loss + distance, parts + Sums({"loss_sampler_kl": float(distance.detach())})
    if objective.entropy_bonus:
        bonus = -objective.entropy_bonus * _aggregate(_entropy(tokens), tokens.weight_N, mask_N)
        loss, parts = loss + bonus, parts + Sums({"loss_entropy": float(bonus.detach())})
    return loss, sums + parts


def _anchor(tokens: Tokens, proximal: Proximal, behaviour_logprobs_N: Tensor) -> Tensor:
    """l_anchor of the surrogate."""
    if proximal == "none":
        return behaviour_logprobs_N
    if proximal == "recomputed":
        return tokens.logprobs_N.detach() if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    if tokens.lag_N is None:
        raise ValueError("an approximated proximal policy needs lag_N; expected the version of every token")
    return approximate_proximal(tokens.logprobs_N, behaviour_logprobs_N, tokens.lag_N)


def _ratios(proximal: Proximal, log_rho_N: Tensor, log_w_N: Tensor) -> SamplerRatios:
    """log_rho_N = l_anchor - l_b, log_w_N = l - l_b."""
    if proximal == "none":
        return SamplerRatios(log_w_N, log_w_N, log_w_N)
    return SamplerRatios(log_rho_N, log_rho_N if proximal == "recomputed" else log_w_N, log_w_N)


def _entropy(tokens: Tokens) -> Tensor:
    if tokens.entropy_N is None:
        raise ValueError("an entropy bonus needs entropy_N; expected the policy's entropy at every token")
    if tokens.logprobs_N.requires_grad and not tokens.entropy_N.requires_grad:
        raise ValueError("an entropy bonus needs the gradient of entropy_N; expected one beside that of logprobs_N")
    return tokens.entropy_N


def _kl_term(tokens: Tokens, kl: KlTerm, log_w_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Sums]:
    if tokens.reference_logprobs_N is None:
        raise ValueError("a KL term needs reference_logprobs_N; expected the reference's log-probabilities")
    kl_N = kl_estimate(log_ratio(tokens.logprobs_N, tokens.reference_logprobs_N, mask_N), kl.estimator)
    sums = Sums({"reference_kl": float(torch.where(mask_N, kl_N.detach(), 0.0).sum(dtype=torch.float64))})
    if kl.importance_weighted:
        kl_N = (log_w_N.detach() if kl.estimator == "k2" else log_w_N).exp() * kl_N
    term = kl.kl_ctl * _aggregate(kl_N, tokens.weight_N, mask_N)
    return term, sums + Sums({"loss_kl": float(term.detach())})


def _aggregate(values_N: Tensor, weight_N: Tensor, mask_N: Tensor) -> Tensor:
    """Sum of weight * value over unmasked tokens: the micro-batch's addend of the global mean."""
    return torch.where(mask_N, values_N * weight_N, 0.0).sum()
