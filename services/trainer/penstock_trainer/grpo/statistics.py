"""Statistics of a step's tokens: addends that micro-batches and ranks add up, and the figures made of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock_trainer.grpo.surrogates import Terms
from penstock_trainer.grpo.tokens import Tokens, unclamped_log_ratio

DROPPED = "dropped_"
SCALE_STEP_NATS = 256.0  # exp of twice half of it, times any count, is far from the ends of float64


@dataclass(frozen=True)
class WeightSums:
    """Sums of the importance weights W of `count` completions, and of their squares.

    W is a product over all tokens of a completion, so that it can leave the range of float64. So the sums are of W and
    W^2 over exp(log_scale) and its square: a multiple of 256 near the largest log W, and 0 as long as all W are within
    exp(+-128). Nothing is clamped. Weights that are lost to rounding are that much smaller than the largest.
    """

    count: int = 0
    total: float = 0.0
    total_squared: float = 0.0
    log_scale: float = 0.0

    @classmethod
    def of(cls, log_w_s: Tensor) -> "WeightSums":
        """The sums of completions with the logarithms float64[s], of which there is at least one."""
        largest = float(log_w_s.max())
        log_scale = SCALE_STEP_NATS * round(largest / SCALE_STEP_NATS) if math.isfinite(largest) else 0.0
        weight_s = (log_w_s - log_scale).exp()
        return cls(log_w_s.numel(), float(weight_s.sum()), float(weight_s.square().sum()), log_scale)

    def __add__(self, other: "WeightSums") -> "WeightSums":
        if not (self.count and other.count):
            return self if self.count else other
        log_scale = max(self.log_scale, other.log_scale)
        mine, its = math.exp(self.log_scale - log_scale), math.exp(other.log_scale - log_scale)
        return WeightSums(
            self.count + other.count,
            self.total * mine + other.total * its,
            self.total_squared * mine**2 + other.total_squared * its**2,
            log_scale,
        )

    @property
    def effective_sample_size_ratio(self) -> float:
        """(sum W)^2 / (S sum W^2); 1 without a completion, for which nothing is to be scaled."""
        return self.total**2 / (self.count * self.total_squared) if self.total_squared else 1.0


@dataclass(frozen=True)
class ExpertSums:
    """How many rows of the forward passes each expert got: counts[layer][expert]; empty without experts."""

    counts: tuple[tuple[int, ...], ...] = ()

    def __add__(self, other: "ExpertSums") -> "ExpertSums":
        if not (self.counts and other.counts):
            return self if self.counts else other
        pairs = zip(self.counts, other.counts, strict=True)
        return ExpertSums(tuple(tuple(map(sum, zip(mine, its, strict=True))) for mine, its in pairs))

    def _shares(self) -> list[list[float]]:
        """Of the layers with a choice, that any row has passed."""
        return [[each / total for each in layer] for layer in self.counts if len(layer) > 1 and (total := sum(layer))]

    @property
    def figures(self) -> dict[str, float]:
        """entropy: mean over layers of the entropy of the use of experts, over that of equal use: 1 if all are used
        alike. busiest_share: the largest share that one expert got of its layer's rows, each counted once for each of
        its experts. Empty without experts.
        """
        shares = self._shares()
        if not shares:
            return {}
        layers = [-sum(each * math.log(each) for each in layer if each) / math.log(len(layer)) for layer in shares]
        return {"entropy": sum(layers) / len(layers), "busiest_share": max(map(max, shares))}


@dataclass(frozen=True)
class Sums:
    """Addends of the statistics of a batch, by name: values to add, and values of which the lowest or highest counts.

    Plain numbers, so that ranks can send them. weights: of the completions. experts: of the rows.
    """

    totals: dict[str, float] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    weights: WeightSums = WeightSums()
    experts: ExpertSums = ExpertSums()

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            {name: self.totals.get(name, 0.0) + other.totals.get(name, 0.0) for name in self.totals | other.totals},
            {
                name: min(each.get(name, float("inf")) for each in (self.lowest, other.lowest))
                for name in self.lowest | other.lowest
            },
            {
                name: max(each.get(name, float("-inf")) for each in (self.highest, other.highest))
                for name in self.highest | other.highest
            },
            self.weights + other.weights,
            self.experts + other.experts,
        )


@dataclass(frozen=True)
class Statistics:
    """Figures of a step, over the tokens of the forward passes whose behaviour log-probability is finite.

    Completions without an advantage have no forward pass unless a KL term or an entropy bonus needs one. Without any
    token nothing was measured: all figures but counts are nan; the parts of the loss only if none was left out either.
    loss_policy, loss_kl, loss_sampler_kl, loss_entropy: the parts of the loss, which they add up to: means over
    mini-batches, as it is.
    entropy: mean in nats. behaviour_kl: mean of exp(x) - 1 - x, x = l - l_b, an estimate of KL(behaviour || policy).
    reference_kl: mean of the configured estimator of KL(policy || reference); 0 without a KL term in the loss.
    teacher_kl: mean of l - l_T, an estimate of KL(policy || teacher); None without a teacher.
    ratio_*: of w = exp(l - l_b). clipped_ratio_low, clipped_ratio_high: shares of tokens whose surrogate was limited.
    effective_sample_size_ratio: (sum W)^2 / (S sum W^2) of the completions' importance weights W, 1 when on-policy.
    experts: entropy and busiest_share of `ExpertSums`, over the rows of the passes that have a gradient; empty without
    experts.
    masked: share of tokens by reason: non_finite (of all loss tokens), and what each part of the correction dropped.
    """

    num_tokens: int
    num_non_finite: int
    loss_policy: float
    loss_kl: float
    loss_sampler_kl: float
    loss_entropy: float
    entropy: float
    behaviour_kl: float
    reference_kl: float
    teacher_kl: float | None
    ratio_min: float
    ratio_mean: float
    ratio_max: float
    clipped_ratio_low: float
    clipped_ratio_high: float
    effective_sample_size_ratio: float
    masked: dict[str, float]
    experts: dict[str, float] = field(default_factory=dict)

    @property
    def clipped_ratio(self) -> float:
        """Share of tokens limited on either side."""
        return self.clipped_ratio_low + self.clipped_ratio_high

    @classmethod
    def of(cls, sums: Sums, num_minibatches: int = 1) -> "Statistics":
        """The statistics of sums, added up over mini-batches."""
        totals = sums.totals
        num_tokens, num_non_finite = totals.get("tokens", 0.0), totals.get("non_finite", 0.0)
        num_loss_tokens = num_tokens + num_non_finite

        def mean(name: str) -> float:
            return totals.get(name, 0.0) / num_tokens if num_tokens else math.nan

        def loss(part: str) -> float:
            return totals.get(part, 0.0) / num_minibatches if num_loss_tokens else math.nan

        dropped = {name.removeprefix(DROPPED): mean(name) for name in totals if name.startswith(DROPPED)}
        return cls(
            num_tokens=int(num_tokens),
            num_non_finite=int(num_non_finite),
            loss_policy=loss("loss_policy"),
            loss_kl=loss("loss_kl"),
            loss_sampler_kl=loss("loss_sampler_kl"),
            loss_entropy=loss("loss_entropy"),
            entropy=mean("entropy"),
            behaviour_kl=mean("behaviour_kl"),
            reference_kl=mean("reference_kl"),
            teacher_kl=mean("teacher_kl") if "teacher_kl" in totals else None,
            ratio_min=sums.lowest.get("ratio", math.nan),
            ratio_mean=mean("ratio"),
            ratio_max=sums.highest.get("ratio", math.nan),
            clipped_ratio_low=mean("clipped_low"),
            clipped_ratio_high=mean("clipped_high"),
            effective_sample_size_ratio=sums.weights.effective_sample_size_ratio if num_tokens else math.nan,
            masked={"non_finite": num_non_finite / num_loss_tokens if num_loss_tokens else math.nan, **dropped},
            experts=sums.experts.figures,
        )


def scaled_learning_rate(learning_rate: float, ess_ratio: float, ess_base: float) -> float:
    """lr sqrt(min(1, ess / ess_base)): smaller steps on batches that weighting has reduced to few samples.

    VCPO (arXiv 2602.17616). ess_ratio: `WeightSums.effective_sample_size_ratio`, whose sums run over ranks first.
    `ess_base` 0 switches it off.
    """
    return learning_rate * min(1.0, ess_ratio / ess_base) ** 0.5 if ess_base else learning_rate


@torch.no_grad()
def token_sums(tokens: Tokens, log_w_N: Tensor, mask_N: Tensor, terms: Terms, dropped: Mapping[str, Tensor]) -> Sums:
    """Addends of one micro-batch. log_w_N = l - l_b, clamped, 0 where masked."""
    x_n = log_w_N[mask_N].double()
    num_non_finite = float(mask_N.numel() - x_n.numel())
    if not x_n.numel():
        return Sums({"non_finite": num_non_finite})
    ratio_n = x_n.exp()
    has_tokens_S = tokens.sum_by_sequence(mask_N) > 0
    log_w_S = tokens.sum_by_sequence(unclamped_log_ratio(tokens.logprobs_N, tokens.behaviour_logprobs_N, mask_N))
    totals = {
        "tokens": float(x_n.numel()),
        "non_finite": num_non_finite,
        "behaviour_kl": float((torch.expm1(x_n) - x_n).sum()),
        "ratio": float(ratio_n.sum()),
        "clipped_low": float(terms.low_N.sum()),
        "clipped_high": float(terms.high_N.sum()),
        **{DROPPED + name: float(each_N.sum()) for name, each_N in dropped.items()},
    }
    if tokens.entropy_N is not None:
        totals["entropy"] = float(tokens.entropy_N[mask_N].sum(dtype=torch.float64))
    extremes = {"ratio": float(ratio_n.min())}, {"ratio": float(ratio_n.max())}
    return Sums(totals, *extremes, WeightSums.of(log_w_S[has_tokens_S]))
