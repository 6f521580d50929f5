"""One GRPO update: packs, forward and backward, optimizer.

Owns the policy's master weights, the optimizer and the frozen reference. Synchronous: the loop calls
it in a thread. Invariant: equal weights, state and groups give bit-identical weights (on a CPU), and
a step with a non-finite loss or gradient changes nothing.

Shapes: N loss tokens of a pack, U distinct (parent row, token) pairs of it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import Config
from penstock.contracts import ScoredGroup
from penstock.errors import ConfigError
from penstock_trainer.batch import BatchCounts, Sample, make_batch, valid_samples
from penstock_trainer.export import config_json, save_folder
from penstock_trainer.grpo import (
    Gate,
    Objective,
    Statistics,
    Sums,
    Tokens,
    kl_estimate,
    log_ratio,
    micro_batch_loss,
    moment_threshold,
    second_moment_gate,
    usable,
)
from penstock_trainer.model import PackModel, load_model
from penstock_trainer.optimizer import Optimizer, OptimizerStep
from penstock_trainer.packing import Pack, make_packs
from penstock_trainer.recipe import make_recipe
from penstock_trainer.weight_files import Dtype, Format, master_weights, published_weights


@dataclass(frozen=True)
class StepResult:
    """What one update did.

    changed: False when loss or gradient norm was not finite, or when no completion had a gradient.
    loss: mean over mini-batches; grad_norm: the largest, before clipping; learning_rate: of the last.
    num_rows: rows of all packs, each one token computed. seconds: by phase: pack, forward_backward, optimizer.
    """

    changed: bool
    loss: float
    grad_norm: float
    learning_rate: float
    statistics: Statistics
    counts: BatchCounts
    num_packs: int
    num_rows: int
    seconds: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class _PreparedPack:
    """A pack; start_N: the policy's log-probabilities at the start of the update, where the recipe needs them."""

    pack: Pack
    start_N: Tensor | None = None


class Learner:
    """The policy under training."""

    def __init__(self, config: Config, *, num_steps: int = 0) -> None:
        """Load the models. `num_steps`: updates of the whole run, for a learning rate that falls until its end.

        `torch.set_num_threads` is set for the process: the learner is its only computation.
        """
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
        self._recipe = make_recipe(config)
        self._optimizer = Optimizer(policy, config.optimizer, num_steps=num_steps * config.loss.num_minibatches)

    @property
    def on_cpu(self) -> bool:
        """Whether the models compute on the CPU."""
        return self._device.type == "cpu"

    @property
    def is_deterministic(self) -> bool:
        """Whether training the same groups again gives the same bits."""
        return self._device.type == "cpu"

    def update(self, groups: Sequence[ScoredGroup], *, version: int) -> StepResult:
        """One update of the weights of `version` on a batch of groups."""
        # Adam's moments of rarely seen tokens decay into subnormal numbers, which are slow. A setting of the thread.
        torch.set_flush_denormal(True)
        try:
            return self._update(groups, version)
        finally:
            torch.set_flush_denormal(False)

    def _update(self, groups: Sequence[ScoredGroup], version: int) -> StepResult:
        start = time.perf_counter()
        penalties = self._kl_penalties(groups, version)
        batch = make_batch(groups, self._recipe.rules, version=version, penalties=penalties)
        minibatches = [[_PreparedPack(pack) for pack in self._packs(samples)] for samples in batch.minibatches]
        objective = self._recipe.objective
        seconds = {"pack": time.perf_counter() - start, "forward_backward": 0.0, "optimizer": 0.0}
        start = time.perf_counter()
        if self._recipe.needs_start:
            minibatches, objective = self._with_start(minibatches)
        sums, outcomes, losses = Sums(), [], []
        for packs in minibatches:
            addends = [self._forward_backward(prepared, objective) for prepared in packs]
            computed = time.perf_counter()
            loss = math.fsum(each for each, _ in addends)
            own = sum((each for _, each in addends), Sums())
            outcomes.append(self._optimizer_step(loss, own, num_packs=len(packs)))
            losses.append(loss)
            sums += own
            seconds["forward_backward"] += computed - start
            start = time.perf_counter()
            seconds["optimizer"] += start - computed
        return StepResult(
            changed=any(outcome.changed for outcome in outcomes),
            loss=sum(losses) / max(1, len(losses)),
            grad_norm=max((outcome.grad_norm for outcome in outcomes), default=0.0),
            learning_rate=outcomes[-1].learning_rate if outcomes else self._optimizer.learning_rate,
            statistics=Statistics.of(sums),
            counts=batch.counts,
            num_packs=sum(map(len, minibatches)),
            num_rows=sum(prepared.pack.num_rows for packs in minibatches for prepared in packs),
            seconds=seconds,
        )

    def _packs(self, samples: Sequence[Sample]) -> list[Pack]:
        return [pack.to(self._device) for pack in make_packs(samples, self._config.actor.max_tokens_per_micro_batch)]

    def _kl_penalties(self, groups: Sequence[ScoredGroup], version: int) -> dict[tuple[int, int], float]:
        """kl_ctl * sum_t KL(behaviour, reference) of each completion, where the KL term is part of the rewards."""
        if not self._recipe.kl_in_reward:
            return {}
        penalties: dict[tuple[int, int], float] = {}
        for pack in self._packs(valid_samples(groups, version=version)):
            tokens = _tokens_of(pack, pack.behaviour_N)
            log_ratio_N = log_ratio(pack.behaviour_N, self._reference_logprobs(pack), usable(tokens))
            sum_S = tokens.sum_by_sequence(kl_estimate(log_ratio_N, self._recipe.kl_estimator))
            for place, kl in zip(pack.places, sum_S.tolist(), strict=True):
                penalties[place] = self._recipe.kl_in_reward * kl
        return penalties

    def _reference_logprobs(self, pack: Pack) -> Tensor:
        assert self._reference is not None
        with torch.no_grad():
            return self._reference.token_logprobs(pack)[0].index_select(0, pack.target_N)

    def _with_start(self, minibatches: list[list[_PreparedPack]]) -> tuple[list[list[_PreparedPack]], Objective]:
        """The packs with the policy's log-probabilities before the first optimizer step, and the objective for them."""
        objective, log_rhos = self._recipe.objective, [torch.zeros(0, device=self._device)]

        def started(pack: Pack) -> _PreparedPack:
            with torch.no_grad():
                start_N = self._policy.token_logprobs(pack)[0].index_select(0, pack.target_N)
            mask_N = usable(_tokens_of(pack, start_N))
            log_rhos.append(log_ratio(start_N, pack.behaviour_N, mask_N)[mask_N])
            return _PreparedPack(pack, start_N)

        prepared = [[started(each.pack) for each in packs] for packs in minibatches]
        if self._recipe.moment_tau is None:
            return prepared, objective
        gate: Gate = partial(
            second_moment_gate, threshold=moment_threshold(torch.cat(log_rhos), self._recipe.moment_tau)
        )
        gates = {**objective.correction.gates, "m2po": gate}
        return prepared, replace(objective, correction=replace(objective.correction, gates=gates))

    def _forward_backward(self, prepared: _PreparedPack, objective: Objective) -> tuple[float, Sums]:
        """The pack's addends of the loss and of the statistics; its gradient is accumulated."""
        pack = prepared.pack
        reference_N = self._reference_logprobs(pack) if objective.kl is not None else None
        logprobs_U, entropy_R = self._policy.token_logprobs(pack, entropy_gradient=objective.entropy_bonus > 0)
        tokens = replace(
            _tokens_of(pack, logprobs_U.index_select(0, pack.target_N)),
            start_N=prepared.start_N,
            reference_N=reference_N,
            entropy_N=entropy_R[pack.target_parent_U[pack.target_N]],
        )
        loss, sums = micro_batch_loss(tokens, objective)
        loss.backward()
        return loss.item(), sums

    def _optimizer_step(self, loss: float, sums: Sums, num_packs: int) -> OptimizerStep:
        """Without packs there is no gradient, and the moments must not move the weights on their own."""
        if num_packs and math.isfinite(loss):
            return self._optimizer.step(ess_ratio=Statistics.of(sums).effective_sample_size_ratio)
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


def _tokens_of(pack: Pack, logprobs_N: Tensor) -> Tokens:
    return Tokens(
        logprobs_N=logprobs_N,
        behaviour_N=pack.behaviour_N,
        advantage_N=pack.advantage_N,
        weight_N=pack.weight_N,
        sequence_N=pack.sequence_N,
        num_sequences=pack.num_sequences,
        lag_N=pack.lag_N,
    )


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)
