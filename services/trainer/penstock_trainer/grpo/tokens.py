"""The loss tokens of one micro-batch, their ratios, and their sums by completion.

Invariant: a token whose behaviour log-probability is not finite is masked and counted, never taken as on-policy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is about 5e8: large enough to be clipped, small enough to stay finite when squared


@dataclass(frozen=True)
class Tokens:
    """N loss tokens of S completions, or paths of episodes; only `logprobs_N` and `entropy_N` have a gradient.

    logprobs_N: l, after temperature. behaviour_logprobs_N: l_b as the sampler gave it, possibly not finite.
    advantage_N: of the token's completion; with a teacher, from `TeacherTerm.taught` on, its own.
    weight_N: its share in the aggregate (`sequence_weight`).
    sequence_N: int64 in [0, num_sequences), the token's completion; all loss tokens of a completion are here.
    old_logprobs_N: l at the start of the update, for a recomputed proximal policy; None if nothing has been updated
    since (then it is sg l).
    lag_N: versions from the weights that sampled the token to those under training, for an approximated proximal.
    reference_logprobs_N: l_r, or None if the objective has no KL term in the loss. teacher_logprobs_N: l_T, likewise.
    draw_N: a number in [0, 1) that depends on the token's place in its completion and batch alone; None if no part
    draws.
    entropy_N: of the policy, in nats; None if neither an entropy bonus nor the statistics need it.

    Example, two completions of 2 and 1 tokens in a group of 2: advantage_N = [0.7, 0.7, -0.7],
    weight_N = [0.5, 0.5, 0.5], sequence_N = [0, 0, 1].
    """

    logprobs_N: Tensor
    behaviour_logprobs_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    sequence_N: Tensor
    num_sequences: int
    old_logprobs_N: Tensor | None = None
    lag_N: Tensor | None = None
    reference_logprobs_N: Tensor | None = None
    entropy_N: Tensor | None = None
    draw_N: Tensor | None = None
    teacher_logprobs_N: Tensor | None = None

    def sum_by_sequence(self, values_N: Tensor) -> Tensor:
        """float64[S]: sums over the tokens of each completion; 0 for one without tokens."""
        zeros_S = torch.zeros(self.num_sequences, dtype=torch.float64, device=values_N.device)
        return zeros_S.index_add(0, self.sequence_N, values_N.double())

    def mean_by_sequence(self, values_N: Tensor, mask_N: Tensor) -> Tensor:
        """float64[S]: means over the unmasked tokens of each completion; 0 for one without any."""
        sum_S = self.sum_by_sequence(torch.where(mask_N, values_N, 0.0))
        return sum_S / self.sum_by_sequence(mask_N).clamp(min=1)

    def spread(self, values_S: Tensor) -> Tensor:
        """[N]: each token gets the value of its completion."""
        return values_S.index_select(0, self.sequence_N)


def usable(tokens: Tokens) -> Tensor:
    """bool[N]: tokens whose behaviour log-probability is finite."""
    return torch.isfinite(tokens.behaviour_logprobs_N)


def log_ratio(logprobs_N: Tensor, other_N: Tensor, mask_N: Tensor) -> Tensor:
    """l - other in float32 (float64 stays), clamped to +-20; 0 without a gradient where masked."""
    return unclamped_log_ratio(logprobs_N, other_N, mask_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def unclamped_log_ratio(logprobs_N: Tensor, other_N: Tensor, mask_N: Tensor) -> Tensor:
    """`log_ratio` without a bound, for what must tell far from further."""
    if logprobs_N.dtype != torch.float64:
        logprobs_N, other_N = logprobs_N.float(), other_N.float()
    return torch.where(mask_N, logprobs_N, 0.0) - torch.where(mask_N, other_N, 0.0)
