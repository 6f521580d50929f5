"""The GRPO family as pure functions over tensors: no config, no services, no I/O.

An objective is a choice of parts, not a class per paper: advantages, a surrogate, the proximal policy it is measured
from, an off-policy correction, a KL term and an aggregation. Everything sees the loss tokens of one micro-batch, flat;
weights carry the aggregation, so that micro-batches of any partition, and ranks, add up to the full batch.

| Part | Module | Choices |
| --- | --- | --- |
| rewards | `advantages` | overlong penalty |
| advantages | `advantages` | baseline and scale over the group, the batch, or none; leave-one-out; mean; whitening |
| surrogate | `surrogates` | PPO clip (asymmetric, dual), GSPO, CISPO, SAPO, DPPO-TV, DPPO-KL, VESPO, REINFORCE |
| proximal | `objective` | none, recomputed, approximated |
| correction | `corrections` | weights: TIS, clip, mask, by token or sequence; gates: geometric, k3, veto, M2PO, OPSM |
| selection | `selection` | highest entropies, Clip-Cov, KL-Cov |
| teacher | `teacher` | the reverse KL to a teacher as advantages of tokens, alone or beside those of rewards |
| KL | `objective` | k1, k2, k3 in the loss, importance-weighted or not; k1 in the reward; quadratic to the sampler |
| aggregation | `aggregation` | token-mean, seq-mean-token-sum, seq-mean-token-mean, token-sum-norm |
| all of it | `objective` | the loss of a micro-batch and the addends of its statistics |

Notation, per token: l policy (the only one with a gradient), l_p proximal, l_b behaviour (from the sampler), l_r
reference, l_T teacher log-probabilities; A advantage. l_anchor is l_p, or l_b without a proximal policy. The
surrogate's ratio is r = exp(l - l_anchor); rho = exp(l_p - l_b) corrects from the sampler to the proximal policy;
w = exp(l - l_b).
Log-ratios are float32 and clamped to +-20 (only the effective sample size takes them as they are); beyond that their
gradient is 0. sg is stop-gradient. Shapes: N loss tokens and S completions of a micro-batch, B groups of G completions.
"""

from penstock_trainer.grpo.advantages import Baseline, Scale, Whitening, advantages, overlong_penalty, varies, whitened
from penstock_trainer.grpo.aggregation import Aggregation, sequence_weight
from penstock_trainer.grpo.corrections import (
    Correction,
    Gate,
    SamplerRatios,
    StepGate,
    Weight,
    clipped_weight,
    geometric_gate,
    k3_gate,
    masked_weight,
    moment_threshold,
    off_policy_gate,
    second_moment_gate,
    second_moment_step_gate,
    sequence_clipped_weight,
    sequence_masked_weight,
    sequence_truncated_weight,
    truncated_weight,
    veto_gate,
)
from penstock_trainer.grpo.objective import (
    Estimator,
    KlTerm,
    Objective,
    Proximal,
    approximate_proximal,
    kl_estimate,
    micro_batch_loss,
)
from penstock_trainer.grpo.selection import clip_cov_step_gate, entropy_step_gate, kl_cov_step_surrogate
from penstock_trainer.grpo.statistics import ExpertSums, Statistics, Sums, scaled_learning_rate
from penstock_trainer.grpo.step_tokens import NO_COLUMNS, StepTokens
from penstock_trainer.grpo.surrogates import (
    Surrogate,
    Terms,
    cispo,
    dppo_kl,
    dppo_tv,
    gspo,
    ppo_clip,
    reinforce,
    sapo,
    vespo,
)
from penstock_trainer.grpo.teacher import TeacherTerm
from penstock_trainer.grpo.tokens import MAX_LOG_RATIO, Tokens, log_ratio, usable

__all__ = [
    "MAX_LOG_RATIO",
    "NO_COLUMNS",
    "Aggregation",
    "Baseline",
    "Correction",
    "Estimator",
    "ExpertSums",
    "Gate",
    "KlTerm",
    "Objective",
    "Proximal",
    "SamplerRatios",
    "Scale",
    "Statistics",
    "StepGate",
    "StepTokens",
    "Sums",
    "Surrogate",
    "TeacherTerm",
    "Terms",
    "Tokens",
    "Weight",
    "Whitening",
    "advantages",
    "approximate_proximal",
    "cispo",
    "clip_cov_step_gate",
    "clipped_weight",
    "dppo_kl",
    "dppo_tv",
    "entropy_step_gate",
    "geometric_gate",
    "gspo",
    "k3_gate",
    "kl_cov_step_surrogate",
    "kl_estimate",
    "log_ratio",
    "masked_weight",
    "micro_batch_loss",
    "moment_threshold",
    "off_policy_gate",
    "overlong_penalty",
    "ppo_clip",
    "reinforce",
    "sapo",
    "scaled_learning_rate",
    "second_moment_gate",
    "second_moment_step_gate",
    "sequence_clipped_weight",
    "sequence_masked_weight",
    "sequence_truncated_weight",
    "sequence_weight",
    "truncated_weight",
    "usable",
    "varies",
    "vespo",
    "veto_gate",
    "whitened",
]
