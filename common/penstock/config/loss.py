"""The section of the configuration for the objective, and its valid combinations.

Owns the rules: reading the configuration refuses an objective that corrects twice, is undefined, or is unsafe with
stale groups. Formulas and sources are in `penstock_trainer.grpo`; presets in examples/presets.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from penstock.config.types import Count, Section

Positive = Annotated[float, Field(gt=0)]
CLIPPED_RATIO = ("ppo", "gspo", "cispo", "sapo")  # measure from an anchor
BEHAVIOUR_ONLY = ("dppo_tv", "dppo_kl", "vespo")  # are defined against the sampler's log-probabilities
SCALED_BASELINES = {  # those from which rewards lie no further than a multiple of the scale
    "group": ("group", "leave_one_out"),
    "batch": ("group", "batch", "leave_one_out"),
    "mean": ("group",),
}


class AdvantageSection(Section):
    """Advantage of a completion: (reward - baseline) / scale."""

    baseline: Literal["group", "batch", "leave_one_out", "none"] = "group"
    """Mean of its group, of the batch, of the others in its group (RLOO), or 0."""
    scale: Literal["group", "batch", "mean", "none"] = "group"
    """Standard deviation of its group (GRPO) or of the batch, the mean of its group's absolute rewards (MaxRL), or 1
    (Dr. GRPO)."""
    eps: Positive = 1e-6
    """Added to a standard deviation."""

    @property
    def trains_equal_rewards(self) -> bool:
        """Whether a degenerate group can have an advantage: true if the baseline is not the group's own mean."""
        return self.baseline in ("batch", "none")


class CorrectionSection(Section):
    """Off-policy correction from the sampler to the anchor (`loss.proximal`): at most one weight, and any gates."""

    weight: Literal["none", "tis", "mask", "sequence_tis", "sequence_mask"] = "none"
    """Factor of a token's loss: 1; min(rho, high); rho within [low, high], else 0; the same for completions."""
    low: Annotated[float, Field(ge=0)] = 0.5
    """Lower bound of the weight `mask` and `sequence_mask`."""
    high: Positive = 2.0
    """Upper bound of the weight. IcePop: mask with 0.5 and 5."""
    gates: tuple[Literal["geometric", "veto", "m2po", "opsm"], ...] = ()
    """Rules that drop tokens or completions: by mean log-ratio, by one extreme ratio, by second moment, by OPSM. They
    look at a real policy of the trainer: the policy now, or for geometric and veto with `proximal: recomputed` that at
    the start of the update."""
    geometric_low: Positive = 0.99
    """Lower bound of a completion's geometric mean ratio."""
    geometric_high: Positive = 1.01
    """Upper bound of a completion's geometric mean ratio."""
    veto_low: Positive = 1e-4
    """A completion with a token ratio below this is dropped."""
    veto_high: Positive = 100.0
    """A completion with a token ratio above this is dropped."""
    m2po_tau: Positive = 0.04
    """The largest squared log-ratios of an optimizer step are dropped until the mean of the rest is below this."""
    opsm_delta: Positive = 0.1
    """Completions with a negative advantage are dropped if their mean of l_b - l is above this."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for low, high in (("low", "high"), ("geometric_low", "geometric_high"), ("veto_low", "veto_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"loss.correction.{low} is {getattr(self, low):g} and loss.correction.{high} "
                    f"{getattr(self, high):g}: expected the former below the latter; change one"
                )
        return self


class KlSection(Section):
    """How the KL divergence from the reference enters; its weight is `kl_ctl`."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """-x, x^2/2 or exp(x) - 1 - x, x = l_r - l. In the reward only k1 has the gradient of the divergence."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or (as in AReaL) subtracted from rewards: summed over the tokens, with the sampler's l_b."""
    importance_weighted: bool = False
    """In the loss: multiply by w = exp(l - l_b), which makes the gradient unbiased off-policy: for k1 and k3 w with its
    gradient (and the estimate unbiased too), for k2 w as a constant."""


class OverlongSection(Section):
    """Soft penalty for completions that come close to `sampling.max_new_tokens` (DAPO); not for episodes."""

    buffer_tokens: Annotated[int, Field(ge=0)] = 0
    """The last tokens before the limit, over which the reward falls by `penalty`; 0: off."""
    penalty: Positive = 1.0
    """Reward that a completion of full length loses."""


class LossSection(Section):
    """The objective (docs/objectives.md); the defaults are those of AReaL's GRPO page."""

    advantage: AdvantageSection = AdvantageSection()
    """Advantages."""
    surrogate: Literal["ppo", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl", "vespo", "reinforce"] = "ppo"
    """The loss of a token."""
    eps_clip: Annotated[float, Field(gt=0, le=1)] = 0.2
    """ppo, gspo, cispo: ratios are clipped from below at 1 - eps_clip."""
    eps_clip_higher: Positive | None = None
    """ppo, gspo, cispo: ratios are clipped from above at 1 + this; null: eps_clip."""
    c_clip: Annotated[float, Field(gt=1)] | None = None
    """ppo: bound of the ratio if the advantage is negative (dual clip); null: none."""
    sapo_tau_positive: Positive = 1.0
    """sapo: temperature of the gate if the advantage is positive."""
    sapo_tau_negative: Positive = 1.05
    """sapo: temperature of the gate if it is not."""
    dppo_low: Positive = 0.15
    """dppo_tv: a token with a negative advantage is left out once its probability has fallen by more."""
    dppo_high: Positive = 0.15
    """dppo_tv: a token with a positive advantage is left out once its probability has risen by more."""
    dppo_kl: Positive = 0.05
    """dppo_kl: bound of the binary KL divergence, in nats."""
    vespo_positive: tuple[Positive, Positive] = (2.0, 3.0)
    """vespo: (k, lambda) if the advantage is not negative."""
    vespo_negative: tuple[Positive, Positive] = (3.0, 2.0)
    """vespo: (k, lambda) if it is negative."""
    proximal: Literal["none", "recomputed", "approximated"] = "none"
    """The anchor of the ratios: the sampler's log-probabilities, the trainer's at the start of the update (decoupled
    PPO), or an interpolation of both by version (A-3PO)."""
    correction: CorrectionSection = CorrectionSection()
    """Off-policy correction."""
    kl: KlSection = KlSection()
    """KL divergence from the reference."""
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm"] = (
        "seq-mean-token-sum"
    )
    """How token losses become one loss: the mean over tokens; or the mean over completions of their sum, of their mean,
    or of their sum divided by `norm_length`."""
    norm_length: Annotated[int, Field(ge=0)] = 0
    """token-sum-norm: the constant length; 0: sampling.max_new_tokens. A run of episodes must set it."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the policy's entropy, which is added to the objective."""
    overlong: OverlongSection = OverlongSection()
    """Penalty for overlong completions."""
    truncated: Literal["train", "leave_out", "zero", "penalty"] = "train"
    """Completions that ended by `sampling.max_new_tokens`: train as any other; leave them out of the loss, with their
    rewards still in baseline and scale (DAPO's overlong filtering; also for episodes cut at `agent.max_turns` or
    `agent.max_tokens`); make their reward zero; or take `truncated_penalty` from it."""
    truncated_penalty: Positive = 1.0
    """truncated penalty: the reward that a truncated completion loses."""
    dynamic_sampling: bool = False
    """Drop degenerate groups (all rewards equal), and draw further prompts until a batch is full (DAPO). Not with a KL
    term or an entropy bonus, from which such groups have a gradient."""
    num_minibatches: Count = 1
    """Optimizer steps per batch, each on an equal share of its groups; the batch still makes one version."""

    @property
    def eps_high(self) -> float:
        """Clip range above 1."""
        return self.eps_clip if self.eps_clip_higher is None else self.eps_clip_higher

    @property
    def reshapes_truncated(self) -> bool:
        """Whether truncated completions have another reward than their functions gave."""
        return self.truncated in ("zero", "penalty")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for reason in (self._corrects_twice(), self._is_undefined(), self._shapes_twice()):
            if reason:
                raise ValueError(reason)
        return self

    def _corrects_twice(self) -> str | None:
        weight = self.correction.weight
        if weight == "none":
            return None
        if self.surrogate in BEHAVIOUR_ONLY:
            return (
                f"loss.correction.weight is {weight} with loss.surrogate {self.surrogate}, which holds the ratio to "
                "the sampler itself: it would be squared. Expected one correction: set loss.correction.weight to none"
            )
        if self.surrogate in CLIPPED_RATIO and self.proximal == "none":
            return (
                f"loss.correction.weight is {weight} with loss.surrogate {self.surrogate} and loss.proximal none: the "
                "ratio is already that to the sampler, and would be squared. Expected one correction: set "
                "loss.correction.weight to none, or loss.proximal to recomputed or approximated"
            )
        return None

    def _is_undefined(self) -> str | None:
        if self.proximal != "none" and self.surrogate not in CLIPPED_RATIO:
            return (
                f"loss.proximal is {self.proximal} with loss.surrogate {self.surrogate}, which has no ratio to a "
                f"proximal policy: expected none, or one of the surrogates {', '.join(CLIPPED_RATIO)}"
            )
        if self.c_clip is not None and self.surrogate != "ppo":
            return (
                f"loss.c_clip is {self.c_clip:g} with loss.surrogate {self.surrogate}: expected null, or surrogate ppo"
            )
        if self.c_clip is not None and self.c_clip <= 1 + self.eps_high:
            return f"loss.c_clip is {self.c_clip:g}: expected more than 1 + eps_clip_higher, {1 + self.eps_high:g}"
        baselines = SCALED_BASELINES.get(self.advantage.scale)
        if baselines and self.advantage.baseline not in baselines:
            reason = "equal rewards would have an advantage, and be divided by loss.advantage.eps alone"
            if self.advantage.scale == "mean":
                reason = "(R - mean) / mean is defined for one mean"
            return (
                f"loss.advantage.scale is {self.advantage.scale} with loss.advantage.baseline "
                f"{self.advantage.baseline}: {reason}. Expected baseline {' or '.join(baselines)}, or scale none"
            )
        if self.dynamic_sampling and self.advantage.trains_equal_rewards:
            return (
                f"loss.dynamic_sampling is true with loss.advantage.baseline {self.advantage.baseline}: groups of "
                "equal rewards have a gradient then, and dropping them would be a bias. Expected baseline group or "
                "leave_one_out"
            )
        if self.kl.place == "reward" and self.kl.estimator != "k1":
            return (
                f"loss.kl.estimator is {self.kl.estimator} with loss.kl.place reward: a reward has no gradient of its "
                "own, and on average this one does not pull the policy to the reference. Expected loss.kl.estimator "
                "k1, or loss.kl.place loss"
            )
        if self.kl.place == "reward" and self.kl.importance_weighted:
            return (
                "loss.kl.importance_weighted is true with loss.kl.place reward: a reward has no gradient to weigh; "
                "expected place loss, or false"
            )
        if self.kl.place == "loss" and self.kl.estimator == "k1" and not self.kl.importance_weighted:
            return (
                "loss.kl.estimator is k1 with loss.kl.place loss: its gradient is that of l, whose mean is 0, so that "
                "nothing holds the policy to the reference. Expected k2 or k3, place reward, or "
                "importance_weighted true"
            )
        return None

    def _shapes_twice(self) -> str | None:
        if not (self.reshapes_truncated and self.overlong.buffer_tokens):
            return None
        return (
            f"loss.truncated is {self.truncated} with loss.overlong.buffer_tokens {self.overlong.buffer_tokens}: a "
            "truncated completion already loses loss.overlong.penalty. Expected one: set loss.truncated to train "
            "or leave_out, or loss.overlong.buffer_tokens to 0"
        )

    def drops_gradients(self, kl_ctl: float) -> str | None:
        """The reason why dynamic sampling must not drop groups of equal rewards; None if it may, or does not."""
        if not self.dynamic_sampling or not (kl_ctl or self.entropy_bonus):
            return None
        key, value = ("kl_ctl", kl_ctl) if kl_ctl else ("loss.entropy_bonus", self.entropy_bonus)
        return (
            f"loss.dynamic_sampling is true with {key} {value:g}: groups of equal rewards have a gradient from that "
            f"term, and dropping them would be a bias. Expected {key} 0, as in DAPO, or loss.dynamic_sampling false"
        )

    def unsafe_off_policy(self, max_staleness: int) -> str | None:
        """The reason why this objective must not train groups of earlier versions; None if it may."""
        if not max_staleness or self.correction.weight != "none" or self.correction.gates:
            return None
        uncorrected = self.surrogate == "reinforce" or self.proximal != "none"
        if not uncorrected:
            return None
        seen = "loss.surrogate is reinforce" if self.surrogate == "reinforce" else f"loss.proximal is {self.proximal}"
        return (
            f"{seen} with loss.correction.weight none and staleness.max_staleness {max_staleness}: nothing corrects or "
            "limits the distance to the sampler. Set loss.correction.weight (tis), or staleness.max_staleness to 0"
        )
