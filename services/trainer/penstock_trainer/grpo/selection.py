"""Which tokens move the policy, by its entropy: those where it chooses, not those that use its choices up.

Owns the choice of a share of all tokens of an optimizer step: by the largest entropies, or by the covariance of
log-probability and advantage, which is how fast a token lowers the entropy. Ties at a bound are all chosen, so that the
choice does not depend on an order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from penstock_trainer.grpo.corrections import Gate, SamplerRatios
from penstock_trainer.grpo.step_tokens import StepTokens
from penstock_trainer.grpo.surrogates import Surrogate, Terms
from penstock_trainer.grpo.tokens import Tokens

TIED = 1e-5  # tokens after equal prefixes have equal values, but for the rounding of the packs that they are in
StepSurrogate = Callable[[StepTokens, Surrogate], Surrogate]  # a surrogate that depends on all tokens of the step


def entropy_step_gate(step: StepTokens, *, share: float) -> Gate:
    """Keep the share of the tokens, rounded up, with the highest entropy.

    "Beyond the 80/20 rule" (arXiv 2506.01939), equation 5: a share of 0.2. Dropped tokens stay in the denominators, as
    there. Deviation: the share is of the tokens that are trained; the paper's batches have no others.
    """
    return partial(entropy_gate, lowest=_largest(step.entropy, math.ceil(share * step.entropy.numel())))


def entropy_gate(tokens: Tokens, ratios: SamplerRatios, mask_N: Tensor, *, lowest: float) -> Tensor:
    """Keep tokens with at least this entropy, in nats."""
    if tokens.entropy_N is None:
        raise ValueError("the gate entropy needs entropy_N; expected the policy's entropy at every token")
    return tokens.entropy_N.detach() >= lowest


@dataclass(frozen=True)
class Covariances:
    """(A - mean A) (l - mean l) of tokens, with the means of all tokens of the step that are trained."""

    mean_advantage: float
    mean_logprob: float

    @classmethod
    def of(cls, step: StepTokens) -> "Covariances":
        num_tokens = max(step.logprobs.numel(), 1)
        return cls(float(step.advantage.double().sum()) / num_tokens, float(step.logprobs.double().sum()) / num_tokens)

    def __call__(self, advantage_N: Tensor, logprobs_N: Tensor) -> Tensor:
        return (advantage_N.double() - self.mean_advantage) * (logprobs_N.detach().double() - self.mean_logprob)


def clip_cov_step_gate(step: StepTokens, *, share: float, low: float, high: float) -> Gate:
    """Drop a share of the tokens, at least one, drawn from those with a covariance between `low` and `high`.

    Clip-Cov (arXiv 2505.22617), equation 12. Deviations: what is drawn depends on a token's place in its completion and
    batch (`Tokens.draw_N`), so that each rank and each replay draws the same; tokens that a clip has limited may be
    among them, and change nothing then.
    """
    covariances = Covariances.of(step)
    values = covariances(step.advantage, step.logprobs)
    draws = step.draw[(values > low) & (values < high)]
    num_dropped = max(int(share * step.logprobs.numel()), 1)
    highest = math.inf if draws.numel() <= num_dropped else float(draws.sort().values[num_dropped - 1])
    return partial(clip_cov_gate, covariances=covariances, low=low, high=high, highest_draw=highest)


def clip_cov_gate(
    tokens: Tokens,
    ratios: SamplerRatios,
    mask_N: Tensor,
    *,
    covariances: Covariances,
    low: float,
    high: float,
    highest_draw: float,
) -> Tensor:
    """Drop tokens whose covariance lies between the bounds, and whose draw is not above `highest_draw`."""
    if tokens.draw_N is None:
        raise ValueError("the gate clip_cov needs draw_N; expected a number in [0, 1) for every token")
    values_N = covariances(tokens.advantage_N, torch.where(mask_N, tokens.logprobs_N, 0.0))
    return ~((values_N > low) & (values_N < high) & (tokens.draw_N <= highest_draw))


def kl_cov_step_surrogate(step: StepTokens, surrogate: Surrogate, *, share: float, coefficient: float) -> Surrogate:
    """`surrogate`, and coefficient * abs(l - l_anchor) for the share of the tokens, at least one, of most covariance.

    KL-Cov (arXiv 2505.22617), equation 13, with verl's absolute log-ratio as the distance.
    """
    covariances = Covariances.of(step)
    values = covariances(step.advantage, step.logprobs)
    lowest = _largest(values, max(int(share * values.numel()), 1))
    return partial(kl_cov, surrogate=surrogate, covariances=covariances, lowest=lowest, coefficient=coefficient)


def kl_cov(
    tokens: Tokens,
    log_ratio_N: Tensor,
    mask_N: Tensor,
    *,
    surrogate: Surrogate,
    covariances: Covariances,
    lowest: float,
    coefficient: float,
) -> Terms:
    """`surrogate`, and coefficient * abs(l - l_anchor) for tokens whose covariance is at least `lowest`."""
    terms = surrogate(tokens, log_ratio_N, mask_N)
    is_held_N = covariances(tokens.advantage_N, torch.where(mask_N, tokens.logprobs_N, 0.0)) >= lowest
    held_N = torch.where(is_held_N, coefficient * log_ratio_N.abs(), 0.0)
    return Terms(terms.loss_N + held_N, terms.low_N, terms.high_N)


def _largest(values: Tensor, count: int) -> float:
    """What the `count` largest values are at least, and those that are tied with the last of them; inf without any."""
    if not values.numel():
        return math.inf
    last = float(values.double().sort(descending=True).values[count - 1])
    return last - TIED * max(1.0, abs(last))
