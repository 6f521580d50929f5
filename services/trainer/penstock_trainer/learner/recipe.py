"""From the configuration to an objective and the rules of its batches.

Owns the mapping of names to functions of `penstock_trainer.grpo`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from penstock.config import Config, LossSection
from penstock.config.loss import CorrectionSection
from penstock.contracts import ScoredGroup
from penstock_trainer import grpo
from penstock_trainer.batching.batch import BatchRules, Overlong, Truncated, make_batch, shaped_rewards


@dataclass(frozen=True)
class Recipe:
    """What a step minimises.

    kl_in_reward: kl_ctl if the KL term (k1) is part of the rewards, else 0.
    """

    objective: grpo.Objective
    rules: BatchRules
    kl_in_reward: float


def make_recipe(config: Config) -> Recipe:
    """The recipe from `loss`, `kl_ctl` and the values of other sections that they need."""
    loss = config.loss
    in_loss = config.kl_ctl > 0 and loss.kl.place == "loss"
    objective = grpo.Objective(
        surrogate=_surrogate(loss),
        proximal=loss.proximal,
        correction=_correction(loss.correction),
        kl=grpo.KlTerm(config.kl_ctl, loss.kl.estimator, loss.kl.importance_weighted) if in_loss else None,
        entropy_bonus=loss.entropy_bonus,
    )
    rules = BatchRules(
        overlong=Overlong(config.sampling.max_new_tokens, loss.overlong.buffer_tokens, loss.overlong.penalty),
        truncated=Truncated(loss.truncated, loss.truncated_penalty),
        baseline=loss.advantage.baseline,
        scale=loss.advantage.scale,
        eps=loss.advantage.eps,
        aggregation=loss.aggregation,
        norm_length=loss.norm_length or config.sampling.max_new_tokens,
        num_minibatches=loss.num_minibatches,
        with_zero_advantage=in_loss or loss.entropy_bonus > 0,
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
    depends_on_more = recipe.kl_in_reward > 0 or recipe.rules.baseline == "batch"
    rules = replace(
        recipe.rules, num_minibatches=1, with_zero_advantage=recipe.rules.with_zero_advantage or depends_on_more
    )
    return lambda group: any(sample.num_usable_tokens for sample in make_batch([group], rules, version=0).samples)


def advantage_test(config: Config) -> Callable[[ScoredGroup], bool]:
    """Whether a group's rewards, as shaped, can give any of its completions that are not left out an advantage."""
    rules = make_recipe(config).rules

    def has_advantage(group: ScoredGroup) -> bool:
        if all(map(rules.truncated.leaves_out, group.group.trajectories)):
            return False
        return config.loss.advantage.trains_equal_rewards or grpo.varies(shaped_rewards(group, rules))

    return has_advantage


def _surrogate(loss: LossSection) -> grpo.Surrogate:
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


def _correction(section: CorrectionSection) -> grpo.Correction:
    low, high = section.low, section.high
    weights: dict[str, grpo.Weight | None] = {
        "none": None,
        "tis": partial(grpo.truncated_weight, high=high),
        "mask": partial(grpo.masked_weight, low=low, high=high),
        "sequence_tis": partial(grpo.sequence_truncated_weight, high=high),
        "sequence_mask": partial(grpo.sequence_masked_weight, low=low, high=high),
    }
    gates: dict[str, grpo.Gate] = {
        "geometric": partial(grpo.geometric_gate, low=section.geometric_low, high=section.geometric_high),
        "veto": partial(grpo.veto_gate, low=section.veto_low, high=section.veto_high),
        "opsm": partial(grpo.off_policy_gate, delta=section.opsm_delta),
    }
    batch_gates: dict[str, grpo.BatchGate] = {"m2po": partial(grpo.second_moment_batch_gate, tau=section.m2po_tau)}
    return grpo.Correction(
        weights[section.weight],
        gates={name: gates[name] for name in section.gates if name in gates},
        batch_gates={name: batch_gates[name] for name in section.gates if name in batch_gates},
    )
