"""The policy under training: its weights, its updates, its state.

Owns the policy's master weights, the optimizer, the reference and the teacher, or this rank's shards of them.
Synchronous: the loop calls it in a thread, a follower in its own. If `reads_beside_gradient`, another thread may read
the weights until an update changes them. Invariant: equal weights, state and groups give bit-identical weights (on a
CPU, on as many ranks), and a step with a non-finite loss or gradient changes nothing.
"""

import gc
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.config import Config
from penstock.config.changes import step_settings
from penstock.contracts import Dtype, ScoredGroup
from penstock.errors import ConfigError
from penstock.weights.manifest import identity_digest
from penstock_trainer.batching.packing import pack_of_sequence
from penstock_trainer.checkpoints.tensors import StateCopy, copy_state
from penstock_trainer.distributed.ranks import Ranks, rank_device
from penstock_trainer.learner.moving_reference import MovingReference
from penstock_trainer.learner.optimizer import Optimizer
from penstock_trainer.learner.recipe import make_recipe
from penstock_trainer.learner.residence import Residence, tensors_of
from penstock_trainer.learner.training_state import carry_training_state, load_training_state, training_state
from penstock_trainer.learner.update import Gradient, PendingUpdate, StepResult, Updater, flushed_subnormals
from penstock_trainer.model.fsdp import ShardedPackModel, full_tensor
from penstock_trainer.model.loading import check_context, check_training_mode, load_model, same_weights
from penstock_trainer.model.lora import WithoutAdapter, adapted, merged_weights
from penstock_trainer.model.pack_model import PackModel
from penstock_trainer.model.token_model import TokenModel
from penstock_trainer.weights.files import Format, MasterWeights, Weights, digests
from penstock_trainer.weights.hugging_face import config_json, save_folder


class Learner:
    """The policy under training."""

    def __init__(
        self, config: Config, ranks: Ranks | None = None, *, num_steps: int = 0, starts_on_host: bool = False
    ) -> None:
        """Load the models, sharded over `ranks` if there are several: then all ranks call each method together.

        `num_steps`: updates of the full run, for a learning rate that falls until its end. `starts_on_host`: the models
        wait in host memory until `to_device`, before which nothing is computed. One rank only.
        On a CPU `torch.set_num_threads` is set for the process: the learner is its only computation.
        """
        self._ranks = ranks
        self._device = ranks.device if ranks else rank_device(config.trainer.device)
        self.num_steps = num_steps
        self._residence = Residence.of(self._device) if starts_on_host else None
        self._loaded_from: Path | None = None
        """The checkpoint whose state this is, until an update begins."""
        self.has_gpu_turn = False
        """Whether the models have moved to the device, and not back."""
        self._make(config)

    def _make(self, config: Config) -> None:
        """Load the models, and make all that depends on the configuration."""
        if self.on_cpu:  # else its threads only load, and copy to files
            torch.set_num_threads(config.actor.num_threads)
        self._config = config
        dtype = torch.bfloat16 if config.actor.dtype == "bfloat16" else torch.float32
        policy = load_model(config.actor.path, "actor.path")
        check_context(policy, config.actor.path, "actor.path", config.rollout.engine.context_length)
        if config.actor.gradient_checkpointing:
            check_training_mode(policy, config.actor.path, "actor.path")
        self._adapter = adapted(policy, config)
        temperature = config.sampling.temperature
        pack_model = PackModel(
            policy,
            dtype=dtype,
            temperature=temperature,
            gradient_checkpointing=config.actor.gradient_checkpointing,
            router_replay=config.actor.router_replay,
        )
        self._policy = self._placed(pack_model, dtype)
        self._scorer = self._policy
        """The model of `sequence_logprobs`."""
        if self.reads_beside_gradient:
            self._scorer = PackModel(same_weights(policy), dtype=dtype, temperature=temperature)
        self._masters = MasterWeights(policy)
        self._reference = self._make_reference(dtype) if config.kl_ctl > 0 else None
        self._moving = self._make_moving_reference()
        self._teacher = self._other_model(config.teacher.path, "teacher.path", dtype) if config.teacher.path else None
        self._optimizer = Optimizer(policy, config.optimizer)
        self._updater = Updater(
            self._policy,
            self._reference,
            self._optimizer,
            make_recipe(config),
            max_tokens=config.actor.max_tokens_per_micro_batch,
            device=self._device,
            ranks=self._ranks,
            moving=self._moving,
            teacher=self._teacher,
        )

    def use(self, config: Config, *, num_steps: int) -> None:
        """Go on with the settings of `config`: weights, moments and the position in the schedule stay as they are.

        If they differ from those in use, the models are made anew, so that the next step has the bits of a learner that
        loaded a checkpoint under these settings. `config` must be of the same model and adapter.
        """
        self.num_steps = num_steps
        if step_settings(config) == step_settings(self._config):
            return
        mesh = self._ranks.host_mesh if self._ranks else None
        carried = copy_state(self.state(), mesh, None).state
        del self._policy, self._scorer, self._masters, self._reference, self._moving, self._optimizer, self._updater
        del self._teacher, self._adapter
        gc.collect()  # two models need not fit
        self._make(config)
        carry_training_state(carried, self._policy.model, self._adapter, self._optimizer, with_rng=self._is_first)
        if self._moving is not None and self._loaded_from is not None:
            self._moving.load(self._loaded_from)  # under the settings before, the reference may have stood still
        elif self._moving is not None:
            self._moving.carry(carried)
        if self._residence is not None and self.has_gpu_turn:
            self._residence.forget()
            self._residence.to_device(self._tensors())

    def to_device(self) -> None:
        """Move models and moments to the device on which they compute, if they started on the host."""
        if self._residence is not None and not self.has_gpu_turn:
            self.has_gpu_turn = True  # also if there is not enough memory for all
            self._residence.to_device(self._tensors())

    def to_host(self) -> None:
        """Move models and moments to host memory, and free the device's, if they started on the host."""
        if self._residence is not None and self.has_gpu_turn:
            self._residence.to_host(self._tensors())
            self.has_gpu_turn = False

    def _tensors(self) -> Iterator[Tensor]:
        """All that training keeps from one step to the next."""
        others = filter(None, map(_own_model, (self._reference, self._teacher)))
        return tensors_of([self._policy.model, *others], self._optimizer.state().values())

    def _make_moving_reference(self) -> MovingReference | None:
        model = _own_model(self._reference)
        if model is None or not self._config.ref.sync_steps:
            return None
        return MovingReference(model, self._policy.model, self._config.ref)

    def _make_reference(self, dtype: torch.dtype) -> TokenModel:
        """The model of ref.path, or the policy as it was before training."""
        path = self._config.ref.path
        return self._other_model(path or self._config.actor.path, "ref.path" if path else "actor.path", dtype)

    def _other_model(self, path: str, key: str, dtype: torch.dtype) -> TokenModel:
        """A model that is not trained, for log-probabilities of the policy's tokens; ConfigError, with `key`."""
        config = self._config
        if self._adapter is not None and path == config.actor.path:
            return WithoutAdapter(self._policy, self._adapter)
        model = load_model(path, key)
        check_context(model, path, key, config.rollout.engine.context_length)
        self._check_rows(model.config.get_text_config().vocab_size, key)
        model.requires_grad_(False)
        return self._placed(PackModel(model, dtype=dtype, temperature=config.sampling.temperature), dtype)

    def _placed(self, model: PackModel, dtype: torch.dtype) -> PackModel | ShardedPackModel:
        """The model on this rank's device, or its shard of it."""
        if self._ranks is not None:
            return ShardedPackModel(model, self._ranks, dtype)
        if self._residence is not None:
            return model  # in host memory
        _move(model.model, self._device)
        return model

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self._config

    @property
    def device(self) -> str:
        """The device of the models: cpu or cuda."""
        return self._device.type

    @property
    def on_cpu(self) -> bool:
        """Whether the models compute on the CPU."""
        return self._device.type == "cpu"

    @property
    def num_ranks(self) -> int:
        return self._ranks.info.num_ranks if self._ranks else 1

    @property
    def is_deterministic(self) -> bool:
        """Whether training the same groups again, on as many ranks, gives the same bits."""
        return self._device.type == "cpu"

    @property
    def reads_beside_gradient(self) -> bool:
        """True if another thread may stage the weights and score the canary until the update's first optimizer step.

        Ranks do one thing at a time, because they do it together. On a GPU kernels are compiled at their first use,
        which is not tested with two threads. Models that move must not be read meanwhile.
        """
        return self._ranks is None and self.on_cpu and self._residence is None

    def begin(self, groups: Sequence[ScoredGroup], *, version: int, max_lag: int | None = None) -> PendingUpdate:
        """The first half of an update of the weights of `version`: a gradient; nothing changes until it is finished.

        Tokens staler than `max_lag` versions are left out.

        >>> pending = learner.begin(groups, version=7)  # doctest: +SKIP
        >>> result = pending.finish()  # the weights are those of version 8 if result.changed  # doctest: +SKIP
        """
        self._loaded_from = None
        self._optimizer.run_steps = self.num_steps * self._config.loss.num_minibatches
        with flushed_subnormals():
            gradient = self._updater.begin(groups, version, max_lag)
        return PendingUpdate(partial(self._finish, gradient))

    def _finish(self, gradient: Gradient) -> StepResult:
        with flushed_subnormals():
            return self._updater.finish(gradient)

    def update(self, groups: Sequence[ScoredGroup], *, version: int, max_lag: int | None = None) -> StepResult:
        """Both halves of an update at once."""
        return self.begin(groups, version=version, max_lag=max_lag).finish()

    def sequence_logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """log p of each token but the first, given those before it, at temperature 1, by the present weights."""
        pack = pack_of_sequence(token_ids).to(self._device)
        with torch.no_grad():
            logprobs_U, _ = self._scorer.token_logprobs(pack, temperature=1.0)
        return tuple(logprobs_U.index_select(0, pack.target_N).tolist())

    def weights(self) -> Weights:
        """Names and shapes as in the model's files, tied weights once: the live float32 masters of one rank.

        Of an adapted model each is merged when it is read.
        """
        return merged_weights(self._policy.model, self._adapter)

    def full_weight(self, name: str) -> Tensor:
        """The full master weight `name`, merged with its adapter, or the full weight of the adapter."""
        return (
            full_tensor(self._masters[name])
            if self._adapter is None
            else self._adapter.full_weight(self._masters, name)
        )

    def fingerprint(self) -> str:
        """Digest (xxh3, 16 hex digits) of the current weights in float32, whatever they are published in."""
        return identity_digest(digests(self.weights(), Format("float32", "nearest")))

    def config_json(self, dtype: Dtype) -> bytes:
        """The model's config.json for weights in `dtype`."""
        return config_json(self._policy.model, dtype)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds: the live tensors, or this rank's shards of them."""
        state = training_state(self._policy.model, self._adapter, self._optimizer, with_rng=self._is_first)
        return state if self._moving is None else state | self._moving.state()

    def snapshot(self, folder: Path) -> StateCopy:
        """A copy of the state, which every rank writes into `folder`."""
        mesh, group = (self._ranks.host_mesh, self._ranks.checkpoints) if self._ranks else (None, None)
        return copy_state(self.state(), mesh, group)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; ConfigError if it is of another model or adapter."""
        load_training_state(folder, self._policy.model, self._adapter, self._optimizer, with_rng=self._is_first)
        if self._moving is not None:
            self._moving.load(folder)
        self._loaded_from = folder

    @property
    def _is_first(self) -> bool:
        return self._ranks is None or not self._ranks.info.is_follower

    def save_pretrained(self, folder: Path, num_steps: int) -> None:
        """Save the published weights, which are of so many steps, as a folder that `from_pretrained` loads."""
        form = Format(self._config.rollout.engine.dtype, self._config.rounding)
        save_adapter = partial(self._adapter.save, get=self.full_weight) if self._adapter else None
        save_folder(self._policy.model, self.weights(), self._config.actor.path, folder, form, save_adapter, num_steps)

    def close(self) -> None:
        """End; no other call may follow."""

    def _check_rows(self, found: int, key: str) -> None:
        """ConfigError if a token of the policy may have no row in another model's embeddings.

        A larger model of a family may have more rows than its tokenizer has tokens.
        """
        own = self._policy.model.config.get_text_config().vocab_size
        if found < own or (found != own and key != "teacher.path"):
            advice = "change teacher.path" if key == "teacher.path" else "change ref.path, or set kl_ctl to 0"
            raise ConfigError(
                f"actor.path has {own} tokens and {key} {found}: expected models with one vocabulary; {advice}"
            )


def _own_model(model: TokenModel | None) -> PreTrainedModel | None:
    """The model behind a reference or teacher; None without one, or if it is the policy without its adapter."""
    return model.model if isinstance(model, PackModel | ShardedPackModel) else None


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)
