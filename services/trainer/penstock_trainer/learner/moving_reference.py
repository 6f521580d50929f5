"""A reference that follows the policy: after every so many updates it takes the policy's weights, or a mixture.

    reference <- (1 - alpha) reference + alpha policy         TR-DPO (arXiv 2404.09656): soft update, hard if alpha is 1

Owns the moves, and the reference's part of a checkpoint: `reference.<weight>`. Invariant: when it moves depends on the
version of the weights alone, and the moved weights are part of the training state. So a run that is resumed or replayed
has the same reference, bit for bit. Each rank moves its own shards.

Weights that have moved stay with the run while the reference moves, also under other settings. One that has not moved
yet is that of `ref.path`, as one that stands still: a checkpoint holds nothing of it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from penstock.config import RefSection
from penstock.errors import ConfigError
from penstock_trainer.checkpoints.tensors import read_shapes, read_state
from penstock_trainer.weights.files import master_weights

REFERENCE = "reference."


class MovingReference:
    """Moves the weights of one model towards those of the policy."""

    def __init__(self, reference: PreTrainedModel, policy: PreTrainedModel, section: RefSection) -> None:
        """Both models with their weights where training has them; ConfigError if they have different shapes."""
        self._reference, self._policy = reference, policy
        self._every, self._alpha = section.sync_steps, section.mixup_alpha
        self._has_moved = False
        self._check_same_shapes(section)

    def _check_same_shapes(self, section: RefSection) -> None:
        own, policy = (
            {name: weight.shape for name, weight in master_weights(model).items()}
            for model in (self._reference, self._policy)
        )
        differing = sorted(name for name in own.keys() | policy.keys() if own.get(name) != policy.get(name))
        if differing:
            raise ConfigError(
                f"ref.sync_steps is {section.sync_steps}, and the models of ref.path {section.path!r} and actor.path "
                f"differ in {len(differing)} weights, first {differing[0]}: expected a model of the same shape, which "
                "can take the policy's weights; change ref.path, or set ref.sync_steps to 0"
            )

    def after_update(self, version: int) -> None:
        """Move if the weights of `version`, which an update has made, are to be taken."""
        if version % self._every:
            return
        policy = master_weights(self._policy)
        with torch.no_grad():
            for name, weight in master_weights(self._reference).items():
                _mix(_local(weight), _local(policy[name]), self._alpha)
        self._has_moved = True

    def state(self) -> dict[str, Tensor]:
        """The live weights by their names in a checkpoint; none if they have not moved yet."""
        return self._named() if self._has_moved else {}

    def _named(self) -> dict[str, Tensor]:
        return {f"{REFERENCE}{name}": weight for name, weight in master_weights(self._reference).items()}

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; one without moved weights leaves those of ref.path."""
        state = self._named()
        if state.keys() <= read_shapes(folder).keys():
            read_state(folder, state)
            self._has_moved = True
        elif self._has_moved:
            raise RuntimeError(f"checkpoint {folder} holds no reference: expected a learner that has trained nothing")

    def carry(self, carried: Mapping[str, Tensor]) -> None:
        """Go on from a copy of the state of earlier settings, if the reference had moved under them."""
        with torch.no_grad():
            for name, weight in self._named().items():
                if name in carried:
                    _local(weight).copy_(_local(carried[name]))
                    self._has_moved = True


def _mix(reference: Tensor, policy: Tensor, alpha: float) -> None:
    """In place, in float32; with alpha 1 a copy, bit for bit."""
    if alpha == 1 or not reference.is_floating_point():
        reference.copy_(policy)
    else:
        reference.mul_(1 - alpha).add_(policy, alpha=alpha)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
