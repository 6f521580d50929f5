"""A model sharded over ranks by FSDP2: each holds a part of every weight, and gathers a layer while it computes it.

Owns how a model is sharded and how full weights come back. Invariant: gradients are sums over ranks, never means (the
loss weights are global already), and no rank holds more than one full weight at a time outside the computation.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from penstock_trainer.batching.packing import Pack
from penstock_trainer.distributed.ranks import Ranks
from penstock_trainer.model.pack_model import PackModel


class ShardedPackModel:
    """A `PackModel` whose weights are sharded; all ranks call it together, each with its own pack."""

    def __init__(self, pack_model: PackModel, ranks: Ranks, dtype: torch.dtype) -> None:
        """Shard the model in place: each decoder layer, and the rest as one (embeddings may be tied to the head)."""
        self.model = pack_model.model
        self.shares_prefixes = pack_model.shares_prefixes
        self.expert_use = pack_model.expert_use
        self._root = _Root(pack_model)
        param_dtype = torch.bfloat16 if dtype == torch.bfloat16 else None
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for layer in _decoder_layers(self.model):
            fully_shard(layer, mesh=ranks.mesh, mp_policy=precision)
        # The root's inputs are packs, whose float32 columns belong to the loss and must stay as they are.
        packs = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        trained = any(weight.requires_grad for weight in self.model.parameters())
        fully_shard(self._root, mesh=ranks.mesh, mp_policy=packs, reshard_after_forward=not trained)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo supports no reduction but sums

    def token_logprobs(
        self, pack: Pack, *, entropy_gradient: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `PackModel.token_logprobs`."""
        logprobs_U, entropy_R = self._root(pack, entropy_gradient, temperature)
        return logprobs_U, entropy_R


class _Root(nn.Module):
    """The full model for FSDP: its forward pass computes a pack, vocabulary projection included."""

    def __init__(self, pack_model: PackModel) -> None:
        super().__init__()
        self.causal_model = pack_model.model
        self._forward = pack_model.token_logprobs

    def forward(self, pack: Pack, entropy_gradient: bool, temperature: float | None) -> tuple[Tensor, Tensor]:
        return self._forward(pack, entropy_gradient=entropy_gradient, temperature=temperature)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or the full tensor of a shard: then all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that Hugging Face keeps on one device each."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
