"""AdamW on float32 master weights, with clipping by the global norm, warm-up and a schedule.

Invariant: a step whose gradient norm or learning rate is not finite changes nothing: no weight, no moment, no
schedule. Weights may be sharded over ranks: then all ranks call `step` together.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock.config import OptimizerSection
from penstock_trainer.grpo import scaled_learning_rate
from penstock_trainer.model.fsdp import full_tensor


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

    def __init__(self, model: nn.Module, section: OptimizerSection) -> None:
        self._section = section
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        matrices = [parameter for parameter in self._parameters.values() if parameter.ndim >= 2]
        others = [parameter for parameter in self._parameters.values() if parameter.ndim < 2]
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
        for parameter in self._parameters.values():  # made now, so that the first step is no slower than the next
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.full_like(parameter, 0.0, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.full_like(parameter, 0.0, memory_format=torch.preserve_format),
            }
        self.num_steps = 0
        self.run_steps = 0
        """Steps of the full run, over which a schedule without `decay_steps` falls."""

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        decay_steps = self._section.decay_steps or self.run_steps
        return self._section.lr * schedule_factor(self._section, self.num_steps, decay_steps)

    def step(self, *, ess_ratio: float = 1.0) -> OptimizerStep:
        """Clip the gradients, update the weights, drop the gradients.

        ess_ratio: effective sample size ratio of the batch, by which `optimizer.ess_base` scales the rate.
        """
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False))
        rate = scaled_learning_rate(self.learning_rate, ess_ratio, self._section.ess_base)
        outcome = OptimizerStep(float(norm), rate, math.isfinite(norm) and math.isfinite(rate))
        if outcome.changed:
            self._clip(gradients, outcome.grad_norm)
            for group in self._adamw.param_groups:
                group["lr"] = outcome.learning_rate
            self._adamw.step()
            self.num_steps += 1
        self.drop_gradients()
        return outcome

    def drop_gradients(self) -> None:
        """Drop accumulated gradients. The next backward pass then stores instead of adding to zeros."""
        self._adamw.zero_grad(set_to_none=True)

    def _clip(self, gradients: list[Tensor], norm: float) -> None:
        if norm > self._section.max_grad_norm:
            torch._foreach_mul_(gradients, self._section.max_grad_norm / (norm + 1e-6))

    def state(self) -> dict[str, Tensor]:
        """Moments by the name of their weight: the live tensors. `num_steps` is not among them."""
        return {
            f"{name}.{key}": tensor
            for name, parameter in self._parameters.items()
            for key, tensor in self._adamw.state[parameter].items()
        }
