"""AdamW on float32 master weights, with clipping by the global norm, warm-up and a schedule.

Invariant: a step whose gradient norm is not finite changes nothing: no weight, no moment, no
schedule. Called by the learner.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import OptimizerSection
from penstock.errors import ConfigError
from penstock_trainer.grpo import scaled_learning_rate


@dataclass(frozen=True)
class OptimizerStep:
    """Gradient norm before clipping, the learning rate, and whether the weights changed."""

    grad_norm: float
    learning_rate: float
    changed: bool


def schedule_factor(section: OptimizerSection, num_steps: int, decay_steps: int) -> float:
    """Share of `lr` for the step after `num_steps`: linear warm-up, then constant, linear or cosine decay.

    The last warm-up step has the full rate; from step `decay_steps` on it is `min_lr_ratio`.
    """
    if num_steps < section.warmup_steps:
        return (num_steps + 1) / section.warmup_steps
    span = decay_steps - section.warmup_steps
    if section.schedule == "constant" or span <= 0:
        return 1.0
    progress = min(1.0, (num_steps - section.warmup_steps) / span)
    left = 1 - progress if section.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * left


class Optimizer:
    """The optimizer of one model; `num_steps` counts the steps that changed weights."""

    def __init__(self, model: nn.Module, section: OptimizerSection, *, num_steps: int = 0) -> None:
        """`num_steps`: steps of the whole run, over which a schedule without `decay_steps` falls."""
        self._section = section
        self._decay_steps = section.decay_steps or num_steps
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in self._parameters if parameter.ndim >= 2]
        others = [parameter for parameter in self._parameters if parameter.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": section.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            fused=True,
        )
        for parameter in self._parameters:  # made now, so that the first step is no slower than the next
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.full_like(parameter, 0.0, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.full_like(parameter, 0.0, memory_format=torch.preserve_format),
            }
        self.num_steps = 0

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return self._section.lr * schedule_factor(self._section, self.num_steps, self._decay_steps)

    def step(self, *, ess_ratio: float = 1.0) -> OptimizerStep:
        """Clip the gradients, update the weights, drop the gradients.

        ess_ratio: effective sample size ratio of the batch, by which `optimizer.ess_base` scales the rate.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)
        rate = scaled_learning_rate(self.learning_rate, ess_ratio, self._section.ess_base)
        outcome = OptimizerStep(float(norm), rate, bool(torch.isfinite(norm)))
        if outcome.changed:
            self._clip(gradients, outcome.grad_norm)
            for group in self._adamw.param_groups:
                group["lr"] = outcome.learning_rate
            self._adamw.step()
            self.num_steps += 1
        self.drop_gradients()
        return outcome

    def drop_gradients(self) -> None:
        """Forget what was accumulated. The next backward pass then stores instead of adding to zeros."""
        self._adamw.zero_grad(set_to_none=True)

    def _clip(self, gradients: list[Tensor], norm: float) -> None:
        if norm > self._section.max_grad_norm:
            torch._foreach_mul_(gradients, self._section.max_grad_norm / (norm + 1e-6))

    def state_dict(self) -> dict[str, Any]:
        """Moments and schedule; the tensors are the live ones."""
        return {"adamw": self._adamw.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; lr, betas and weight decay stay those of the configuration."""
        saved, own = state["adamw"], self._adamw.state_dict()
        counts = [[len(group["params"]) for group in groups["param_groups"]] for groups in (saved, own)]
        if counts[0] != counts[1]:
            raise ConfigError(
                f"the checkpoint's optimizer holds {counts[0]} weights (matrices, others) and the model {counts[1]}: "
                "expected the same model; check actor.path"
            )
        self._adamw.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
        self.num_steps = int(state["num_steps"])
