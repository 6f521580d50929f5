"""One GRPO update: packs, forward and backward, optimizer.

Owns the policy's master weights, the optimizer and the frozen reference. Synchronous: the loop calls
it in a thread. Invariant: equal weights, state and groups give bit-identical weights (on a CPU), and
a step with a non-finite loss or gradient changes nothing.

Shapes: N loss tokens of a pack, U distinct (parent row, token) pairs of it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import Config
from penstock.contracts import ScoredGroup
from penstock.errors import ConfigError
from penstock_trainer.batch import BatchCounts, make_batch
from penstock_trainer.export import config_json, save_folder
from penstock_trainer.grpo import Statistics, Sums, Tokens, grpo_loss
from penstock_trainer.model import PackModel, load_model
from penstock_trainer.optimizer import Optimizer, OptimizerStep
from penstock_trainer.packing import Pack, make_packs
from penstock_trainer.weight_files import Dtype, Format, master_weights, published_weights


@dataclass(frozen=True)
class StepResult:
    """What one update did.

    changed: False when loss or gradient norm was not finite, or when no completion had a gradient.
    num_rows: rows of all packs, each one token computed. seconds: by phase: pack, forward_backward, optimizer.
    entropy: mean over the loss tokens of the packs, in nats.
    """

    changed: bool
    loss: float
    grad_norm: float
    learning_rate: float
    entropy: float
    statistics: Statistics
    counts: BatchCounts
    num_packs: int
    num_rows: int
    seconds: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class _Totals:
    """Sums over the packs of a batch."""

    loss: float = 0.0
    entropy: float = 0.0
    num_tokens: int = 0
    sums: Sums = field(default_factory=Sums)


class Learner:
    """The policy under training."""

    def __init__(self, config: Config) -> None:
        """Load the models. `torch.set_num_threads` is set for the process: the learner is its only computation."""
        torch.set_num_threads(config.actor.num_threads)
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if config.actor.dtype == "bfloat16" else torch.float32
        policy = load_model(config.actor.path, "actor.path")
        _move(policy, self._device)
        temperature = config.sampling.temperature
        self._policy = PackModel(
            policy, dtype=dtype, temperature=temperature, gradient_checkpointing=config.actor.gradient_checkpointing
        )
        self._reference: PackModel | None = None
        if config.kl_ctl > 0:
            reference = load_model(
                config.ref.path or config.actor.path, "ref.path" if config.ref.path else "actor.path"
            )
            self._check_same_vocabulary(policy.config.vocab_size, reference.config.vocab_size)
            reference.requires_grad_(False)
            _move(reference, self._device)
            self._reference = PackModel(reference, dtype=dtype, temperature=temperature)
        self._optimizer = Optimizer(policy, config.optimizer)

    @property
    def on_cpu(self) -> bool:
        """Whether the models compute on the CPU."""
        return self._device.type == "cpu"

    @property
    def is_deterministic(self) -> bool:
        """Whether training the same groups again gives the same bits."""
        return self._device.type == "cpu"

    def update(self, groups: Sequence[ScoredGroup]) -> StepResult:
        """One step on a batch of groups."""
        # Adam's moments of rarely seen tokens decay into subnormal numbers, which are slow. A setting of the thread.
        torch.set_flush_denormal(True)
        try:
            return self._update(groups)
        finally:
            torch.set_flush_denormal(False)

    def _update(self, groups: Sequence[ScoredGroup]) -> StepResult:
        start = time.perf_counter()
        batch = make_batch(
            groups,
            advantage_eps=self._config.loss.advantage_eps,
            with_zero_advantage=self._reference is not None,
        )
        packs = make_packs(batch.samples, self._config.actor.max_tokens_per_micro_batch)
        packed = time.perf_counter()
        totals = _Totals()
        for pack in packs:
            self._forward_backward(pack.to(self._device), totals)
        computed = time.perf_counter()
        outcome = self._optimizer_step(totals.loss, num_packs=len(packs))
        return StepResult(
            changed=outcome.changed,
            loss=totals.loss,
            grad_norm=outcome.grad_norm,
            learning_rate=outcome.learning_rate,
            entropy=totals.entropy / max(1, totals.num_tokens),
            statistics=Statistics.of(totals.sums),
            counts=batch.counts,
            num_packs=len(packs),
            num_rows=sum(pack.num_rows for pack in packs),
            seconds={
                "pack": packed - start,
                "forward_backward": computed - packed,
                "optimizer": time.perf_counter() - computed,
            },
        )

    def _forward_backward(self, pack: Pack, totals: _Totals) -> None:
        reference_N: Tensor | None = None
        if self._reference is not None:
            with torch.no_grad():
                reference_N = self._reference.token_logprobs(pack)[0].index_select(0, pack.target_N)
        logprobs_U, entropy_R = self._policy.token_logprobs(pack)
        tokens = Tokens(
            logprobs_N=logprobs_U.index_select(0, pack.target_N),
            behaviour_N=pack.behaviour_N,
            advantage_N=pack.advantage_N,
            weight_N=pack.weight_N,
            reference_N=reference_N,
        )
        loss, sums = grpo_loss(tokens, eps_clip=self._config.loss.eps_clip, kl_ctl=self._config.kl_ctl)
        loss.backward()
        totals.loss += loss.item()
        totals.entropy += float(entropy_R[pack.target_parent_U[pack.target_N]].sum(dtype=torch.float64))
        totals.num_tokens += pack.target_N.numel()
        totals.sums += sums

    def _optimizer_step(self, loss: float, num_packs: int) -> OptimizerStep:
        """Without packs there is no gradient, and the moments must not move the weights on their own."""
        if num_packs and math.isfinite(loss):
            return self._optimizer.step()
        self._optimizer.drop_gradients()
        return OptimizerStep(grad_norm=0.0, learning_rate=self._optimizer.learning_rate, changed=False)

    def weights(self) -> Mapping[str, Tensor]:
        """Names and shapes as in the model's files, tied weights once: the live float32 masters."""
        return published_weights(self._policy.model)

    def config_json(self, dtype: Dtype) -> bytes:
        """The model's config.json for weights in `dtype`."""
        return config_json(self._policy.model, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, schedule and random state: live tensors and plain values. Save before the next update."""
        return {
            "model": master_weights(self._policy.model),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; ConfigError when it is of another model."""
        own = master_weights(self._policy.model)
        saved: dict[str, Tensor] = state["model"]
        differing = sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name].shape != saved[name].shape]
        if differing:
            raise ConfigError(
                f"the checkpoint and actor.path ({self._config.actor.path!r}) differ in {len(differing)} weights, "
                f"first {differing[0]}: expected the same model; set actor.path back or choose another run.name"
            )
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(saved[name])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def save_pretrained(self, folder: Path) -> None:
        """The weights as they are published, as a folder that `from_pretrained` loads, with the tokenizer."""
        form = Format(self._config.rollout.engine.dtype, self._config.weights.rounding)
        save_folder(self._policy.model, self._config.actor.path, folder, form)

    @staticmethod
    def _check_same_vocabulary(policy: int, reference: int) -> None:
        if policy != reference:
            raise ConfigError(
                f"actor.path has {policy} tokens and ref.path {reference}: expected models with one vocabulary; "
                "change ref.path, or set kl_ctl to 0"
            )


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)
