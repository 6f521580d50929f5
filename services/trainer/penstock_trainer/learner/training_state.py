"""The state of training: weights, moments, schedule, random state, as tensors by name.

Owns the names of a checkpoint's tensors: `model.<weight>`, `optimizer.<weight>.<moment>`, `num_steps`, `rng`. Of an
adapted model it holds only the adapter's weights, and `lora.alpha`, `lora.base`. Of a sharded model it holds this
rank's shards; the random state is that of rank 0.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from penstock.errors import ConfigError
from penstock_trainer.checkpoints.tensors import read_shapes, read_state
from penstock_trainer.learner.optimizer import Optimizer
from penstock_trainer.model.lora import Adapter
from penstock_trainer.weights.files import master_weights

MODEL, OPTIMIZER, NUM_STEPS, RNG = "model.", "optimizer.", "num_steps", "rng"


def model_state(model: PreTrainedModel, adapter: Adapter | None) -> dict[str, Tensor]:
    """The live weights; of an adapted model those of the adapter."""
    weights = master_weights(model)
    if adapter is None:
        return {f"{MODEL}{name}": weight for name, weight in weights.items()}
    return {f"{MODEL}{name}": weight for name, weight in adapter.trained(weights).items()} | adapter.marks()


def training_state(
    model: PreTrainedModel, adapter: Adapter | None, optimizer: Optimizer, *, with_rng: bool
) -> dict[str, Tensor]:
    """The live weights and moments, and copies of the rest."""
    state = model_state(model, adapter)
    state |= {f"{OPTIMIZER}{name}": moment for name, moment in optimizer.state().items()}
    state[NUM_STEPS] = torch.tensor(optimizer.num_steps)
    if with_rng:
        state[RNG] = torch.get_rng_state()
    return state


def load_training_state(
    folder: Path, model: PreTrainedModel, adapter: Adapter | None, optimizer: Optimizer, *, with_rng: bool
) -> None:
    """Go on from a checkpoint; ConfigError if it is of another model or adapter."""
    state = training_state(model, adapter, optimizer, with_rng=with_rng)
    _read(folder, state, adapter, (MODEL, OPTIMIZER))
    _set_plain(state, optimizer, with_rng=with_rng)


def carry_training_state(
    carried: Mapping[str, Tensor],
    model: PreTrainedModel,
    adapter: Adapter | None,
    optimizer: Optimizer,
    *,
    with_rng: bool,
) -> None:
    """Go on from a copy of the state of the same model and adapter, made on the same ranks."""
    state = training_state(model, adapter, optimizer, with_rng=with_rng)
    with torch.no_grad():
        for name, tensor in state.items():
            _local(tensor).copy_(_local(carried[name]))
    _set_plain(state, optimizer, with_rng=with_rng)


def load_model_state(folder: Path, model: PreTrainedModel, adapter: Adapter | None) -> None:
    """Load only the weights of a checkpoint; ConfigError if it is of another model or adapter."""
    _read(folder, model_state(model, adapter), adapter, (MODEL,))


def _set_plain(state: Mapping[str, Tensor], optimizer: Optimizer, *, with_rng: bool) -> None:
    """Take over what the state holds as copies, not as live tensors."""
    optimizer.num_steps = int(state[NUM_STEPS])
    if with_rng:
        torch.set_rng_state(state[RNG])


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _read(folder: Path, state: dict[str, Tensor], adapter: Adapter | None, compared: tuple[str, ...]) -> None:
    _check_same_model(folder, state, compared)
    read_state(folder, state)
    if adapter is not None:
        adapter.check_marks(folder, state)


def _check_same_model(folder: Path, state: dict[str, Tensor], prefixes: tuple[str, ...]) -> None:
    saved = {name: shape for name, shape in read_shapes(folder).items() if name.startswith(prefixes)}
    own = {name: tensor.shape for name, tensor in state.items() if name.startswith(prefixes)}
    differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if differing:
        raise ConfigError(
            f"checkpoint {folder} and the model of actor.path differ in {len(differing)} weights and moments, first "
            f"{differing[0]}: expected the same model and the same actor.lora; set actor.path and actor.lora back or "
            "choose another run.name"
        )
