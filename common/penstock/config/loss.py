"""The section of the configuration for the objective, and its valid combinations.

Owns the rules: reading the configuration refuses an objective that corrects twice, is undefined, or is unsafe with
stale groups. Formulas and sources are in `penstock_trainer.grpo`; presets in examples/presets.
"""

import difflib
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from penstock.config.types import Count, Section

Positive = Annotated[float, Field(gt=0)]
SURROGATES = ("ppo", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl", "vespo", "reinforce")
SURROGATE_SCHEMA = {"anyOf": [{"enum": list(SURROGATES)}, {"type": "string", "pattern": ".:."}]}
CLIPPED_RATIO = ("ppo", "gspo", "cispo", "sapo")  # measure from an anchor
BEHAVIOUR_ONLY = ("dppo_tv", "dppo_kl", "vespo")  # are defined against the sampler's log-probabilities
SCALED_BASELINES = {  # those from which rewards lie no further than a multiple of the scale
    "group": ("group", "leave_one_out"),
    "batch": ("group", "batch", "leave_one_out"),
    "mean": ("group",),
}


def _known_or_own(name: str) -> str:
    """The name of a surrogate: one of Penstock's, or `module:function`."""
    module, separator, function = name.partition(":")
    if name in SURROGATES or (separator and module and function):
        return name
    near = next(iter(difflib.get_close_matches(name, SURROGATES, n=1)), "")
    hint = f"; did you mean {near}?" if near else ""
    raise ValueError(f"expected one of {', '.join(SURROGATES)}, or your own module:function{hint}")


class AdvantageSection(Section):
    """Advantage of a completion: (reward - baseline) / scale."""

    baseline: Literal["group", "batch", "leave_one_out", "none"] = "group"
    """Mean of its group, of the batch, of the others in its group (RLOO), or 0."""
    scale: Literal["group", "batch", "mean", "none"] = "group"
    """Standard deviation of its group (GRPO) or of the batch, the mean of its group's absolute rewards (MaxRL), or 1
    (Dr. GRPO)."""
    eps: Positive = 1e-6
    """Added to a standard deviation."""
    function: str = ""
    """Your own `module:function` in place of baseline and scale: (rewards[B, G], is_valid[B, G]) -> advantages[B, G],
    as tensors (docs/objectives.md)."""
    by_function: dict[str, float] = Field(default={})
    """Weights of reward functions that have baseline and scale of their own (GDPO); a completion's advantage is the
    weighted sum of theirs. Empty: the reward, which is the weighted sum of all functions, has one."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Rewards that differ by no more than this are equal: a group of such rewards is degenerate. For noise, such as
    that of a reward model, which a scale would make as large as any other difference."""

    whitening: Literal["none", "completions", "tokens"] = "none"
    """After baseline and scale: minus the mean and over the deviation of the batch's advantages, of which each
    completion is one (GDPO), or each of its tokens (REINFORCE++)."""

    @property
    def depends_on_the_batch(self) -> bool:
        """Whether a degenerate group can have an advantage that only the other groups of the batch give it."""
        return self.baseline == "batch" or self.whitening != "none" or bool(self.function)

    @property
    def trains_equal_rewards(self) -> bool:
        """Whether a degenerate group can have an advantage: true if the baseline is not the group's own mean."""
        return self.baseline in ("batch", "none") or bool(self.function)


class CorrectionSection(Section):
    """Off-policy correction from the sampler to the anchor (`loss.proximal`): at most one weight, and any gates."""

    weight: Literal["none", "tis", "clip", "mask", "sequence_tis", "sequence_clip", "sequence_mask"] = "none"
    """Factor of a token's loss: 1; min(rho, high); rho, at least low and at most high; rho within [low, high], else 0;
    the same for completions."""
    low: Annotated[float, Field(ge=0)] = 0.5
    """Lower bound of the weights `clip` and `mask`, of tokens or completions."""
    high: Positive = 2.0
    """Upper bound of the weight. IcePop: mask with 0.5 and 5."""
    normalized: bool = False
    """Divide the weight by its mean over the optimizer step: over the tokens, or the completions, that it keeps. Costs
    a forward pass of each mini-batch."""
    gates: tuple[Literal["geometric", "k3", "veto", "m2po", "opsm"], ...] = ()
    """Rules that drop tokens or completions: by mean log-ratio, by mean k3, by one extreme ratio, by second moment, by
    OPSM. They look at a real policy of the trainer: the policy now, or for geometric, k3 and veto with
    `proximal: recomputed` that at the start of the update."""
    geometric_low: Positive = 0.99
    """Lower bound of a completion's geometric mean ratio."""
    geometric_high: Positive = 1.01
    """Upper bound of a completion's geometric mean ratio."""
    k3_high: Positive = 0.01
    """Upper bound of a completion's mean k3 estimate of the divergence from the sampler, in nats a token."""
    veto_low: Positive = 1e-4
    """A completion with a token ratio below this is dropped."""
    veto_high: Positive = 100.0
    """A completion with a token ratio above this is dropped."""
    m2po_tau: Positive = 0.04
    """The largest squared log-ratios of an optimizer step are dropped until the mean of the rest is below this."""
    opsm_delta: Positive = 0.1
    """Completions with a negative advantage are dropped if their mean of l_b - l is above this."""

    @property
    def unit(self) -> Literal["tokens", "sequences"]:
        """What has a weight."""
        return "sequences" if self.weight.startswith("sequence_") else "tokens"

    @model_validator(mode="after")
    def _has_what_it_normalizes(self) -> Self:
        if self.normalized and self.weight == "none":
            raise ValueError(
                "loss.correction.normalized is true with loss.correction.weight none: there is no weight to divide by "
                "its mean; expected false, or a weight (tis)"
            )
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for low, high in (("low", "high"), ("geometric_low", "geometric_high"), ("veto_low", "veto_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"loss.correction.{low} is {getattr(self, low):g} and loss.correction.{high} "
                    f"{getattr(self, high):g}: expected the former below the latter; change one"
                )
        return self


class SelectionSection(Section):
    """Which tokens of an optimizer step have a surrogate, by the entropy of the policy. Any choice costs a forward pass
    of each mini-batch. None of them is a correction."""

    entropy_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only this share of the trained tokens, those with the highest entropy, has a surrogate (0.2 in "Beyond the 80/20
    rule")."""
    covariance: Literal["none", "clip", "kl"] = "none"
    """What to do with tokens that lower the entropy fast, by (A - mean A) (l - mean l): nothing, drop some (Clip-Cov),
    or hold the largest to the anchor (KL-Cov)."""
    covariance_share: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Clip-Cov, KL-Cov: the share of the trained tokens that is dropped or held; at least one."""
    covariance_low: float = 1.0
    """Clip-Cov: tokens with a covariance above this may be dropped."""
    covariance_high: float = 5.0
    """Clip-Cov: and below this."""
    covariance_kl: Positive = 1.0
    """KL-Cov: weight of abs(l - l_anchor) of the tokens that are held."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.covariance_low >= self.covariance_high:
            raise ValueError(
                f"loss.selection.covariance_low is {self.covariance_low:g} and loss.selection.covariance_high "
                f"{self.covariance_high:g}: expected the former below the latter; change one"
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
    surrogate: Annotated[str, AfterValidator(_known_or_own), WithJsonSchema(SURROGATE_SCHEMA)] = "ppo"
    """The loss of a token: ppo, gspo, cispo, sapo, dppo_tv, dppo_kl, vespo, reinforce, or your own `module:function`
    (docs/objectives.md)."""
    modules_path: str = "."
    """Folder that is added to the import path for `module:function`."""
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
    selection: SelectionSection = SelectionSection()
    """Which tokens have a surrogate."""
    kl: KlSection = KlSection()
    """KL divergence from the reference."""
    sampler_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (l - l_b)^2 / 2 of each token in the loss, which pulls the policy to the sampler (DRO's beta; twice
    prime-rl's kl_tau)."""
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
    def has_own_surrogate(self) -> bool:
        """Whether the surrogate is the user's."""
        return self.surrogate not in SURROGATES

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
        for reason in (
            self._corrects_twice(),
            self._is_undefined(),
            self._has_undefined_advantages(),
            self._has_idle_kl_term(),
            self._shapes_twice(),
        ):
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
        if self.proximal != "none" and not self.has_own_surrogate and self.surrogate not in CLIPPED_RATIO:
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
        return None

    def _has_undefined_advantages(self) -> str | None:
        baselines = SCALED_BASELINES.get(self.advantage.scale)
        if baselines and self.advantage.baseline not in baselines:
            reason = "equal rewards would have an advantage, and be divided by loss.advantage.eps alone"
            if self.advantage.scale == "mean":
                reason = "(R - mean) / mean is defined for one mean"
            return (
                f"loss.advantage.scale is {self.advantage.scale} with loss.advantage.baseline "
                f"{self.advantage.baseline}: {reason}. Expected baseline {' or '.join(baselines)}, or scale none"
            )
        if why := self._has_no_function_of_its_own():
            return why
        name = self.advantage.function
        if name and not (name.partition(":")[0] and name.partition(":")[2]):
            return f"loss.advantage.function is {name!r}: expected your own module:function, or nothing"
        if name and self.advantage.tolerance:
            return (
                f"loss.advantage.tolerance is {self.advantage.tolerance:g} with loss.advantage.function {name}, which "
                "compares rewards itself: expected loss.advantage.tolerance 0"
            )
        if self.advantage.tolerance and self.advantage.baseline == "none":
            return (
                f"loss.advantage.tolerance is {self.advantage.tolerance:g} with loss.advantage.baseline none, which "
                "compares no rewards: expected loss.advantage.tolerance 0, or another baseline"
            )
        if self.dynamic_sampling and (self.advantage.trains_equal_rewards or self.advantage.depends_on_the_batch):
            return (
                f"loss.dynamic_sampling is true with loss.advantage.baseline {self.advantage.baseline}, whitening "
                f"{self.advantage.whitening} and function {name!r}: groups of equal rewards have a gradient then, and "
                "dropping them would be a bias. Expected baseline group or leave_one_out, and neither whitening nor a "
                "function"
            )
        return None

    def _has_idle_kl_term(self) -> str | None:
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

    def _has_no_function_of_its_own(self) -> str | None:
        """The reason why advantages of each reward function make no sense; None if they do."""
        functions = self.advantage.by_function
        if not functions:
            return None
        key = f"loss.advantage.by_function has {', '.join(functions)}"
        if self.advantage.function:
            return f"{key} with loss.advantage.function {self.advantage.function}: expected one of them"
        if self.advantage.baseline not in ("group", "leave_one_out"):
            return f"{key} with loss.advantage.baseline {self.advantage.baseline}: expected group or leave_one_out"
        if self.overlong.buffer_tokens:
            return (
                f"{key} with loss.overlong.buffer_tokens {self.overlong.buffer_tokens}, a penalty that belongs to no "
                "function: expected loss.overlong.buffer_tokens 0"
            )
        if self.reshapes_truncated:
            return (
                f"{key} with loss.truncated {self.truncated}, a reward that belongs to no function: expected "
                "loss.truncated train or leave_out"
            )
        if self.kl.place == "reward":
            return f"{key} with loss.kl.place reward, a term that belongs to no function: expected loss.kl.place loss"
        return None

    def drops_gradients(self, kl_ctl: float) -> str | None:
        """The reason why dynamic sampling must not drop groups of equal rewards; None if it may, or does not."""
        terms = {"kl_ctl": kl_ctl, "loss.sampler_kl": self.sampler_kl, "loss.entropy_bonus": self.entropy_bonus}
        key, value = next(((key, value) for key, value in terms.items() if value), ("", 0.0))
        if not self.dynamic_sampling or not key:
            return None
        return (
            f"loss.dynamic_sampling is true with {key} {value:g}: groups of equal rewards have a gradient from that "
            f"term, and dropping them would be a bias. Expected {key} 0, as in DAPO, or loss.dynamic_sampling false"
        )

    def unsafe_off_policy(self, max_staleness: int) -> str | None:
        """The reason why this objective must not train groups of earlier versions; None if it may."""
        if not max_staleness or self.correction.weight != "none" or self.correction.gates or self.sampler_kl:
            return None
        uncorrected = self.surrogate == "reinforce" or self.proximal != "none"
        if not uncorrected:
            return None
        seen = "loss.surrogate is reinforce" if self.surrogate == "reinforce" else f"loss.proximal is {self.proximal}"
        return (
            f"{seen} with loss.correction.weight none and staleness.max_staleness {max_staleness}: nothing corrects or "
            "limits the distance to the sampler. Set loss.correction.weight (tis), loss.sampler_kl, or "
            "staleness.max_staleness to 0"
        )
