"""On-policy distillation: how likely the teacher finds the sampled tokens is an advantage of each of them.

    A_t <- reward_weight A + kl_ctl (l_T - sg l)            l_T: the teacher's log-probability of the token

Thinking Machines, "On-Policy Distillation" (2025); the reverse KL on the student's own samples is that of GKD (arXiv
2306.13649) and MiniLLM (arXiv 2306.08543). A surrogate whose gradient is -A w grad l, w = exp(l - l_b), then moves the
policy by the gradient of kl_ctl KL(policy, teacher), token by token, for prefixes of the sampler: also off-policy.
Without a teacher this module is not used.

Deviations: l is the policy now, as in prime-rl, where Thinking Machines and slime take that which sampled: both are the
same on-policy, and only the former has the gradient of the divergence otherwise. A token does not answer for the
divergence of those after it (their discount of 0). The log-ratio is clamped to +-20, and neither baseline nor scale
changes it.
"""

from dataclasses import dataclass, replace

import torch

from penstock_trainer.grpo.statistics import Sums
from penstock_trainer.grpo.tokens import Tokens, log_ratio, usable


@dataclass(frozen=True)
class TeacherTerm:
    """kl_ctl: weight of the teacher's log-ratio; reward_weight: of the completion's own advantage beside it."""

    kl_ctl: float
    reward_weight: float = 1.0

    def taught(self, tokens: Tokens) -> Tokens:
        """The tokens with advantages of their own; those without a finite l_b keep a multiple of their completion's."""
        advantage_N = self.reward_weight * tokens.advantage_N + self.kl_ctl * _log_ratio(tokens)
        return replace(tokens, advantage_N=advantage_N.to(tokens.advantage_N.dtype))


def teacher_sums(tokens: Tokens) -> Sums:
    """The addend of l - l_T, the k1 estimate of KL(policy, teacher); none without a token that is usable."""
    if not bool(usable(tokens).any()):
        return Sums()
    return Sums({"teacher_kl": float(-_log_ratio(tokens).sum(dtype=torch.float64))})


def _log_ratio(tokens: Tokens) -> torch.Tensor:
    """l_T - l, without a gradient; 0 where masked."""
    if tokens.teacher_logprobs_N is None:
        raise ValueError("a teacher needs teacher_logprobs_N; expected its log-probabilities of the loss tokens")
    return log_ratio(tokens.teacher_logprobs_N, tokens.logprobs_N.detach(), usable(tokens))
