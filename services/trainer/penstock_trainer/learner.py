"""One GRPO update: packs, forward and backward, optimizer.

Owns the policy's master weights, the optimizer and the frozen reference, or this rank's shards of
them. Synchronous: the loop calls it in a thread, a follower in its own. Invariant: equal weights,
state and groups give bit-identical weights (on a CPU, on as many ranks), and a step with a
non-finite loss or gradient changes nothing.

Shapes: N loss tokens of a pack, U distinct (parent row, token) pairs of it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from penstock.config import Config
from penstock.contracts import ScoredGroup
from penstock.errors import ConfigError
from penstock_trainer.batch import BatchCounts, make_batch
from penstock_trainer.checkpoint_state import Snapshot, copy_state
from penstock_trainer.export import config_json, save_folder
from penstock_trainer.grpo import Statistics, Sums, Tokens, grpo_loss
from penstock_trainer.model import PackModel, load_model
from penstock_trainer.optimizer import Optimizer, OptimizerStep
from penstock_trainer.packing import Pack
from penstock_trainer.ranks import Ranks
from penstock_trainer.sharding import ShardedPackModel, whole
from penstock_trainer.sharing import share
from penstock_trainer.training_state import load_training_state, training_state
from penstock_trainer.weight_files import Dtype, Format, Weights, master_weights, published_weights


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

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        """Load the models, sharded over `ranks` where there are several: then all ranks call each method together.

        `torch.set_num_threads` is set for the process: the learner is its only computation.
        """
        torch.set_num_threads(config.actor.num_threads)
        self._config = config
        self._ranks = ranks
        self._device = ranks.device if ranks else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if config.actor.dtype == "bfloat16" else torch.float32
        policy = load_model(config.actor.path, "actor.path")
        temperature = config.sampling.temperature
        self._policy = self._placed(
            PackModel(
                policy, dtype=dtype, temperature=temperature, gradient_checkpointing=config.actor.gradient_checkpointing
            ),
            dtype,
        )
        self._reference: PackModel | ShardedPackModel | None = None
        if config.kl_ctl > 0:
            reference = load_model(
                config.ref.path or config.actor.path, "ref.path" if config.ref.path else "actor.path"
            )
            self._check_same_vocabulary(policy.config.vocab_size, reference.config.vocab_size)
            reference.requires_grad_(False)
            self._reference = self._placed(PackModel(reference, dtype=dtype, temperature=temperature), dtype)
        self._optimizer = Optimizer(policy, config.optimizer)

    def _placed(self, model: PackModel, dtype: torch.dtype) -> PackModel | ShardedPackModel:
        """The model on this rank's device, or its shard of it."""
        if self._ranks is not None:
            return ShardedPackModel(model, self._ranks, dtype)
        _move(model.model, self._device)
        return model

    @property
    def on_cpu(self) -> bool:
        """Whether the models compute on the CPU."""
        return self._device.type == "cpu"

    @property
    def num_ranks(self) -> int:
        return self._ranks.place.num_ranks if self._ranks else 1

    @property
    def is_deterministic(self) -> bool:
        """Whether training the same groups again, on as many ranks, gives the same bits."""
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
        rank = self._ranks.place.rank if self._ranks else 0
        work = share(batch.samples, self._config.actor.max_tokens_per_micro_batch, rank, self.num_ranks)
        packed = time.perf_counter()
        totals = _Totals()
        for pack in work.packs:
            if pack.target_N.numel():
                self._forward_backward(pack.to(self._device), totals)
            else:
                self._accompany(pack.to(self._device))
        totals = self._over_ranks(totals)
        computed = time.perf_counter()
        outcome = self._optimizer_step(totals.loss, num_packs=work.num_packs)
        return StepResult(
            changed=outcome.changed,
            loss=totals.loss,
            grad_norm=outcome.grad_norm,
            learning_rate=outcome.learning_rate,
            entropy=totals.entropy / max(1, totals.num_tokens),
            statistics=Statistics.of(totals.sums),
            counts=batch.counts,
            num_packs=work.num_packs,
            num_rows=work.num_rows,
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

    def _accompany(self, pack: Pack) -> None:
        """Without loss tokens of its own a rank still gathers weights and adds gradients with the others."""
        if self._reference is not None:
            with torch.no_grad():
                self._reference.token_logprobs(pack)
        self._policy.token_logprobs(pack)[0].sum().backward()

    def _over_ranks(self, totals: _Totals) -> _Totals:
        """The totals of all ranks, added in the order of ranks on each of them."""
        if self._ranks is None:
            return totals
        total = _Totals()
        for data in self._ranks.gather(msgspec.msgpack.encode(totals)):
            other = msgspec.msgpack.decode(data, type=_Totals)
            total.loss += other.loss
            total.entropy += other.entropy
            total.num_tokens += other.num_tokens
            total.sums += other.sums
        return total

    def _optimizer_step(self, loss: float, num_packs: int) -> OptimizerStep:
        """Without packs there is no gradient, and the moments must not move the weights on their own."""
        if num_packs and math.isfinite(loss):
            return self._optimizer.step()
        self._optimizer.drop_gradients()
        return OptimizerStep(grad_norm=0.0, learning_rate=self._optimizer.learning_rate, changed=False)

    def weights(self) -> Weights:
        """Names and shapes as in the model's files, tied weights once: the live float32 masters of one rank."""
        return published_weights(self._policy.model)

    def whole_weight(self, name: str) -> Tensor:
        """All of the master weight `name`."""
        return whole(master_weights(self._policy.model)[name])

    def config_json(self, dtype: Dtype) -> bytes:
        """The model's config.json for weights in `dtype`."""
        return config_json(self._policy.model, dtype)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds: the live tensors, or this rank's shards of them."""
        return training_state(self._policy.model, self._optimizer, with_rng=self._is_first)

    def snapshot(self, folder: Path) -> Snapshot:
        """A copy of the state, to be written into `folder` by every rank."""
        mesh, group = (self._ranks.host_mesh, self._ranks.checkpoints) if self._ranks else (None, None)
        return copy_state(self.state(), mesh, group)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; ConfigError when it is of another model."""
        load_training_state(folder, self._policy.model, self._optimizer, with_rng=self._is_first)

    @property
    def _is_first(self) -> bool:
        return self._ranks is None or not self._ranks.place.is_follower

    def save_pretrained(self, folder: Path) -> None:
        """The weights as they are published, as a folder that `from_pretrained` loads, with the tokenizer."""
        form = Format(self._config.rollout.engine.dtype, self._config.weights.rounding)
        save_folder(self._policy.model, self.weights(), self._config.actor.path, folder, form)

    def close(self) -> None:
        """Nothing more will be asked for."""

    @staticmethod
    def _check_same_vocabulary(policy: int, reference: int) -> None:
        if policy != reference:
            raise ConfigError(
                f"actor.path has {policy} tokens and ref.path {reference}: expected models with one vocabulary; "
                "change ref.path, or set kl_ctl to 0"
            )


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)
