"""From the configuration to an objective and the rules of its batches.

Owns the mapping of names to functions of `penstock_trainer.grpo`, and to those of users.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from penstock.config import Config, LossSection
from penstock.config.loss import SelectionSection
from penstock.contracts import ScoredGroup
from penstock_trainer import grpo
from penstock_trainer.batching.batch import (
    MIN_VALID,
    BatchRules,
    Overlong,
    Truncated,
    make_batch,
    num_valid,
    shaped_rewards,
)
from penstock_trainer.batching.reward_columns import RewardScale, reward_columns
from penstock_trainer.grpo.selection import StepSurrogate
from penstock_trainer.learner.own_parts import own_advantage, own_surrogate


@dataclass(frozen=True)
class Recipe:
    """What a step minimises.

    kl_in_reward: kl_ctl if the KL term (k1) is part of the rewards, else 0.
    """

    objective: grpo.Objective
    rules: BatchRules
    kl_in_reward: float


def make_recipe(config: Config) -> Recipe:
    """The recipe from `loss`, `kl_ctl`, `teacher` and the values of other sections that they need."""
    loss = config.loss
    in_loss = config.kl_ctl > 0 and loss.kl.place == "loss"
    has_teacher = config.teacher.teaches
    objective = grpo.Objective(
        surrogate=_surrogate(loss),
        proximal=loss.proximal,
        correction=_correction(loss),
        kl=grpo.KlTerm(config.kl_ctl, loss.kl.estimator, loss.kl.importance_weighted) if in_loss else None,
        sampler_kl=loss.sampler_kl,
        entropy_bonus=loss.entropy_bonus,
        step_surrogate=_step_surrogate(loss.selection),
        teacher=grpo.TeacherTerm(config.teacher.kl_ctl, config.teacher.reward_weight) if has_teacher else None,
    )
    rules = BatchRules(
        overlong=Overlong(config.sampling.max_new_tokens, loss.overlong.buffer_tokens, loss.overlong.penalty),
        truncated=Truncated(loss.truncated, loss.truncated_penalty),
        reward_scale=RewardScale(config.reward.scale, config.reward.clip),
        baseline=loss.advantage.baseline,
        scale=loss.advantage.scale,
        eps=loss.advantage.eps,
        tolerance=loss.advantage.tolerance,
        whitening=loss.advantage.whitening,
        own_advantages=own_advantage(loss),
        by_function=loss.advantage.by_function,
        aggregation=loss.aggregation,
        norm_length=loss.norm_length or config.sampling.max_new_tokens,
        num_minibatches=loss.num_minibatches,
        with_zero_advantage=in_loss or has_teacher or loss.sampler_kl > 0 or loss.entropy_bonus > 0,
        router_replay=config.actor.router_replay,
        served_teacher=bool(config.teacher.urls),
    )
    return Recipe(
        objective=objective,
        rules=rules,
        kl_in_reward=config.kl_ctl if loss.kl.place == "reward" else 0.0,
    )


def gradient_test(config: Config) -> Callable[[ScoredGroup], bool]:
    """Whether a group can change the policy: False means that its gradient is exactly 0.

    It can if a usable token has an advantage; if another term has a gradient, or advantages depend on more than the
    group's rewards (on the batch, on a KL term in the reward), if it has a usable token. Then it may be 0 by chance.
    """
    recipe = make_recipe(config)
    depends_on_more = recipe.kl_in_reward > 0 or config.loss.advantage.depends_on_the_batch
    rules = replace(
        recipe.rules, num_minibatches=1, with_zero_advantage=recipe.rules.with_zero_advantage or depends_on_more
    )
    return lambda group: any(sample.num_usable_tokens for sample in make_batch([group], rules, version=0).samples)


def advantage_test(config: Config) -> Callable[[ScoredGroup], bool]:
    """Whether a group's rewards, as shaped, can give any of its completions that are not left out an advantage.

    A teacher gives one to all.
    """
    rules, section = make_recipe(config).rules, config.loss.advantage
    functions = tuple(section.by_function)

    def has_advantage(group: ScoredGroup) -> bool:
        if all(map(rules.truncated.leaves_out, group.group.trajectories)):
            return False
        if config.teacher.teaches or (section.trains_equal_rewards and not functions):
            return True
        columns = reward_columns(group, functions) if functions else [shaped_rewards(group, rules)]
        return any(grpo.varies(column, section.tolerance) for column in columns)

    return has_advantage


def signal_test(config: Config) -> Callable[[ScoredGroup], bool]:
    """Whether a group has two rewards or more, and they differ; with advantages by function, the values of any do."""
    section = config.loss.advantage
    functions = tuple(section.by_function)

    def has_signal(group: ScoredGroup) -> bool:
        columns = reward_columns(group, functions)
        return num_valid(group) >= MIN_VALID and any(grpo.varies(column, section.tolerance) for column in columns)

    return has_signal


def _surrogate(loss: LossSection) -> grpo.Surrogate:
    if own := own_surrogate(loss):
        return own
    low, high = loss.eps_clip, loss.eps_high
    choices: dict[str, grpo.Surrogate] = {
        "ppo": partial(grpo.ppo_clip, eps_low=low, eps_high=high, dual_clip=loss.c_clip),
        "gspo": partial(grpo.gspo, eps_low=low, eps_high=high),
        "cispo": partial(grpo.cispo, eps_low=low, eps_high=high),
        "sapo": partial(grpo.sapo, tau_positive=loss.sapo_tau_positive, tau_negative=loss.sapo_tau_negative),
        "dppo_tv": partial(grpo.dppo_tv, low=loss.dppo_low, high=loss.dppo_high),
        "dppo_kl": partial(grpo.dppo_kl, threshold=loss.dppo_kl),
        "vespo": partial(grpo.vespo, positive=loss.vespo_positive, negative=loss.vespo_negative),
        "reinforce": grpo.reinforce,
    }
    return choices[loss.surrogate]


def _step_surrogate(section: SelectionSection) -> StepSurrogate | None:
    if section.covariance != "kl":
        return None
    return partial(grpo.kl_cov_step_surrogate, share=section.covariance_share, coefficient=section.covariance_kl)


def _selecting_gates(section: SelectionSection) -> dict[str, grpo.StepGate]:
    """Those of the section `selection`, by the names under which their tokens are counted."""
    gates: dict[str, grpo.StepGate] = {}
    if section.entropy_share < 1:
        gates["entropy"] = partial(grpo.entropy_step_gate, share=section.entropy_share)
    if section.covariance == "clip":
        low, high = section.covariance_low, section.covariance_high
        gates["clip_cov"] = partial(grpo.clip_cov_step_gate, share=section.covariance_share, low=low, high=high)
    return gates


def _correction(loss: LossSection) -> grpo.Correction:
    section = loss.correction
    low, high = section.low, section.high
    weights: dict[str, grpo.Weight | None] = {
        "none": None,
        "tis": partial(grpo.truncated_weight, high=high),
        "clip": partial(grpo.clipped_weight, low=low, high=high),
        "mask": partial(grpo.masked_weight, low=low, high=high),
        "sequence_tis": partial(grpo.sequence_truncated_weight, high=high),
        "sequence_clip": partial(grpo.sequence_clipped_weight, low=low, high=high),
        "sequence_mask": partial(grpo.sequence_masked_weight, low=low, high=high),
    }
    gates: dict[str, grpo.Gate] = {
        "geometric": partial(grpo.geometric_gate, low=section.geometric_low, high=section.geometric_high),
        "k3": partial(grpo.k3_gate, high=section.k3_high),
        "veto": partial(grpo.veto_gate, low=section.veto_low, high=section.veto_high),
        "opsm": partial(grpo.off_policy_gate, delta=section.opsm_delta),
    }
    step_gates: dict[str, grpo.StepGate] = {"m2po": partial(grpo.second_moment_step_gate, tau=section.m2po_tau)}
    chosen: dict[str, grpo.StepGate] = {name: step_gates[name] for name in section.gates if name in step_gates}
    return grpo.Correction(
        weights[section.weight],
        gates={name: gates[name] for name in section.gates if name in gates},
        step_gates={**chosen, **_selecting_gates(loss.selection)},
        normalized=section.unit if section.normalized else None,
    )
