"""Off-policy corrections: factors of the surrogate for a sampler that was another policy than the anchor.

A weight rho_hat multiplies, a gate keeps or drops; one weight and any gates can be combined. A weight leads from the
sampler to the anchor. A gate asks how far a real policy of the trainer is from the sampler, so none looks at an
interpolation (`SamplerRatios`). Tokens that are dropped stay in the denominators. A step gate, and a weight that is
normalized, depend on all tokens of an optimizer step: the step prepares the correction with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from penstock_trainer.grpo.step_tokens import StepTokens
from penstock_trainer.grpo.tokens import MAX_LOG_RATIO, Tokens


@dataclass(frozen=True)
class SamplerRatios:
    """Log-ratios of the trainer's policies to the sampler: without a gradient, clamped, 0 where masked.

    | Field | proximal none | recomputed | approximated | For |
    | --- | --- | --- | --- | --- |
    | anchor_N | l - l_b | l_old - l_b | interpolation - l_b | weights |
    | trainer_N | l - l_b | l_old - l_b | l - l_b | geometric, veto |
    | policy_N | l - l_b | l - l_b | l - l_b | OPSM, M2PO |

    l is the policy now, l_old that at the start of the update; they differ from the second optimizer step on.
    """

    anchor_N: Tensor
    trainer_N: Tensor
    policy_N: Tensor


Weight = Callable[[Tokens, Tensor, Tensor], Tensor]  # (tokens, log_rho_N, mask_N) -> rho_hat_N
Gate = Callable[[Tokens, SamplerRatios, Tensor], Tensor]  # (tokens, ratios, mask_N) -> keep_N
StepGate = Callable[[StepTokens], Gate]  # all unmasked tokens of the step, over all ranks -> its gate


@dataclass(frozen=True)
class Correction:
    """At most one weight, and gates by name; a token stays if all gates keep it.

    step_gates: not prepared yet. normalized: the weight is to be divided by its mean over the tokens, or the sequences,
    that it keeps; None: as it is.
    """

    weight: Weight | None = None
    gates: Mapping[str, Gate] = field(default_factory=dict)
    step_gates: Mapping[str, StepGate] = field(default_factory=dict)
    normalized: Literal["tokens", "sequences"] | None = None

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to be prepared."""
        return bool(self.step_gates) or self.normalized is not None

    def prepared(self, step: StepTokens) -> "Correction":
        """The correction for one optimizer step: its unmasked tokens, by the weights as they are, over all ranks."""
        gates = {name: make_gate(step) for name, make_gate in self.step_gates.items()}
        weight = self.weight
        if weight is not None and self.normalized is not None:
            mean = step.mean_weight(of_sequences=self.normalized == "sequences")
            weight = partial(divided_weight, weight=weight, divisor=mean)
        return Correction(weight, gates={**self.gates, **gates})

    def own_weight(self, tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor) -> Tensor:
        """rho_hat_N before any gate; 1 without a weight."""
        return torch.ones_like(log_rho_N) if self.weight is None else self.weight(tokens, log_rho_N, mask_N)

    def __call__(self, tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(rho_hat_N with dropped tokens at 0, which tokens each reason dropped)."""
        if self.depends_on_step:
            parts = ", ".join((*self.step_gates, *(["a normalized weight"] if self.normalized else [])))
            raise ValueError(f"{parts} need all tokens of the step: expected `prepared`")
        weight_N = self.own_weight(tokens, ratios.anchor_N, mask_N)
        dropped = {} if self.weight is None else {"weight": mask_N & (weight_N == 0)}
        for name, gate in self.gates.items():
            keep_N = gate(tokens, ratios, mask_N)
            dropped[name] = mask_N & ~keep_N
            weight_N = torch.where(keep_N, weight_N, 0.0)
        return weight_N, dropped


def truncated_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, high: float) -> Tensor:
    """min(rho, high): truncated importance sampling (Yao et al. 2025), usual bounds 1.5 to 5."""
    return log_rho_N.exp().clamp(max=high)


def masked_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, low: float, high: float) -> Tensor:
    """rho if low <= rho <= high, else 0: masked importance sampling; IcePop is [0.5, 5]."""
    return _within(log_rho_N.exp(), low, high)


def clipped_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, low: float, high: float) -> Tensor:
    """rho, at least `low` and at most `high`: truncated from both sides, so that every token keeps a gradient."""
    return log_rho_N.exp().clamp(low, high)


def sequence_truncated_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, high: float) -> Tensor:
    """min(product of rho over the completion, high); the log of the product is clamped to +-20."""
    return _product(tokens, log_rho_N).clamp(max=high)


def sequence_masked_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, low: float, high: float) -> Tensor:
    """The product of rho over the completion if it is in [low, high], else 0 for all its tokens."""
    return _within(_product(tokens, log_rho_N), low, high)


def sequence_clipped_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, low: float, high: float) -> Tensor:
    """The product of rho over the completion, at least `low` and at most `high`."""
    return _product(tokens, log_rho_N).clamp(low, high)


def divided_weight(tokens: Tokens, log_rho_N: Tensor, mask_N: Tensor, *, weight: Weight, divisor: float) -> Tensor:
    """`weight` over a constant: with its mean over the step as divisor, the weights of a step have the mean 1.

    Self-normalized importance sampling: biased, but a step on stale groups is as large as one on fresh ones (verl's
    rollout_is_batch_normalize). The mean is that of what the weight keeps, after its bounds and before any gate.
    """
    return weight(tokens, log_rho_N, mask_N) / divisor


def geometric_gate(tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor, *, low: float, high: float) -> Tensor:
    """Keep a completion iff low <= geometric mean of its ratios (`SamplerRatios.trainer_N`) <= high.

    A product grows with length, the geometric mean does not: the usual bounds are 0.99 and 1.01 (Liu and Li 2025,
    richardli.xyz/post/rl-collapse-part3).
    """
    mean_S = tokens.mean_by_sequence(ratios.trainer_N, mask_N).exp()
    return tokens.spread((mean_S >= low) & (mean_S <= high))


def k3_gate(tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor, *, high: float) -> Tensor:
    """Keep a completion iff its mean of rho - 1 - log rho (`SamplerRatios.trainer_N`) <= high.

    That is the k3 estimate of KL(sampler, trainer) for tokens of the sampler. Each term is positive, so that ratios
    above and below 1 do not make up for each other, as they do in a geometric mean. The usual bound is 0.01 (verl's
    seq_mean_k3).
    """
    k3_N = torch.expm1(ratios.trainer_N) - ratios.trainer_N
    return tokens.spread(tokens.mean_by_sequence(k3_N, mask_N) <= high)


def veto_gate(tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor, *, low: float, high: float) -> Tensor:
    """Drop a completion if one of its ratios (`SamplerRatios.trainer_N`) is outside [low, high], often [1e-4, 100]."""
    rho_N = ratios.trainer_N.exp()
    outside_N = mask_N & ((rho_N < low) | (rho_N > high))
    return tokens.spread(tokens.sum_by_sequence(outside_N) == 0)


def off_policy_gate(tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor, *, delta: float) -> Tensor:
    """Drop a completion with A < 0 and mean(l_b - l) > delta, l of the policy now.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): bad completions that have become
    improbable, by stale weights, by another engine or by the steps of this very update. With a teacher, which makes
    advantages of tokens: of such a completion its tokens with A < 0.
    """
    far_N = tokens.spread(tokens.mean_by_sequence(-ratios.policy_N, mask_N) > delta)
    return ~((tokens.advantage_N < 0) & far_N)


def second_moment_step_gate(step: StepTokens, *, tau: float) -> Gate:
    """M2PO (arXiv 2510.01161): keep tokens with (l - l_b)^2 below the `moment_threshold` of the step's batch.

    The second moment is that of the policy now against the sampler, over the tokens that the optimizer step trains.
    """
    return partial(second_moment_gate, threshold=moment_threshold(step.log_w, tau))


def moment_threshold(log_w: Tensor, tau: float) -> float:
    """Smallest (l - l_b)^2 that must be dropped for the mean of the rest to be below tau; inf to drop nothing.

    The tokens with the largest squares are dropped. Equal squares at the threshold are all dropped, so that the result
    does not depend on their order.
    """
    squares = log_w.double().square().sort().values
    means = squares.cumsum(0) / torch.arange(1, squares.numel() + 1, device=squares.device)
    num_kept = int((means < tau).sum())  # means of ascending values ascend
    return float("inf") if num_kept == squares.numel() else float(squares[num_kept])


def second_moment_gate(tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor, *, threshold: float) -> Tensor:
    """Keep tokens with (l - l_b)^2 below the threshold."""
    return ratios.policy_N.double().square() < threshold


def _product(tokens: Tokens, log_rho_N: Tensor) -> Tensor:
    log_rho_S = tokens.sum_by_sequence(log_rho_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return tokens.spread(log_rho_S.exp()).to(log_rho_N.dtype)


def _within(values_N: Tensor, low: float, high: float) -> Tensor:
    return torch.where((values_N >= low) & (values_N <= high), values_N, 0.0)
