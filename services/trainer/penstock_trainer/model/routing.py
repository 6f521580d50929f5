"""Router replay: the trainer routes each row through the experts that the engine routed it through (R3, 2510.11370).

Owns the rows' experts that are forced upon the routers of a model, and which routers take them. A router that is forced
keeps its own gradient: the weights of the experts are those of its own softmax, at the given experts. Invariant: a row
without given experts is routed as without this module.

    p = softmax(router's logits)      weights = p at the chosen experts [over their sum, if the router normalizes]
    chosen = the K largest, or those that are given

Routers and what is forced upon them are attributes of the model's modules, so that a copy of the model is independent
and a recomputation in the backward pass sees what the forward pass saw.

Shapes: P rows, K experts of a row in a layer, W of it in all decoder layers, E experts of a layer.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.errors import ConfigError
from penstock_trainer.model.experts import layer_of

FORCED = "penstock_forced_PK"  # attribute of a router: the experts of the rows of the next pass, -1: its own; or None
NORMALIZES = "penstock_normalizes"
SAME_WEIGHTS = 1e-5  # of experts: two orders of the same float32 operations


class RouterReplay:
    """The routers of one model that may be forced."""

    def __init__(self, model: PreTrainedModel) -> None:
        """No router is forced before `force`. ConfigError if the model has none, or one of another form."""
        text = model.config.get_text_config()
        self._num_layers: int = text.num_hidden_layers
        self._routers = {layer_of(name): module for name, module in model.named_modules() if _is_router(module)}
        if not self._routers:
            raise _refused(model, "no router that returns logits, weights and experts")
        for layer, router in self._routers.items():
            form = _form(router)
            if form is None or layer < 0:
                raise _refused(model, f"a router ({type(router).__name__}) whose weights are no softmax over experts")
            setattr(router, NORMALIZES, form)
            setattr(router, FORCED, None)
            router.register_forward_hook(_force)

    def force(self, experts_PW: Tensor | None) -> None:
        """Route the rows of the next pass through these experts; -1, or None for all: as the model would.

        ConfigError if they are of another model.
        """
        for layer, router in self._routers.items():
            setattr(router, FORCED, None if experts_PW is None else self._of_layer(experts_PW, layer, router))

    def _of_layer(self, experts_PW: Tensor, layer: int, router: nn.Module) -> Tensor:
        top_k, num_experts = cast(int, router.top_k), cast(int, router.num_experts)
        if experts_PW.shape[1] == self._num_layers * top_k:
            forced_PK = experts_PW[:, layer * top_k : (layer + 1) * top_k]
            largest = int(forced_PK.max())
            if largest < num_experts:
                return forced_PK
            seen = f"expert number {largest}"
        else:
            seen = f"{experts_PW.shape[1]} experts"
        raise ConfigError(
            f"actor.router_replay is true, and the engine routed a token through {seen}: expected {top_k} of "
            f"{num_experts} experts in each of {self._num_layers} layers, as actor.path has them; serve this model, or "
            "set actor.router_replay to false"
        )


def _is_router(module: nn.Module) -> bool:
    """By transformers' names: `Qwen3MoeTopKRouter`, `MixtralTopKRouter`."""
    return type(module).__name__.lower().endswith("topkrouter") and isinstance(getattr(module, "weight", None), Tensor)


def _form(router: nn.Module) -> bool | None:
    """Whether the router normalizes its weights; None if they are of neither form. By its answer to random rows."""
    weight: Any = router.weight
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, weight.shape[1], generator=generator)
    with torch.no_grad():
        answer = router(rows)
    if not isinstance(answer, tuple) or len(answer) != 3:
        return None
    logits_PE, weights_PK, experts_PK = answer
    if experts_PK.shape != (len(rows), getattr(router, "top_k", 0)) or logits_PE.shape[0] != len(rows):
        return None
    for normalizes in (True, False):
        seen_PK = _weights(logits_PE, experts_PK, normalizes)
        if weights_PK.shape == seen_PK.shape and torch.allclose(seen_PK, weights_PK.float(), atol=SAME_WEIGHTS):
            return normalizes
    return None


def _weights(logits_PE: Tensor, experts_PK: Tensor, normalizes: bool) -> Tensor:
    weights_PK = torch.softmax(logits_PE, dim=-1, dtype=torch.float32).gather(-1, experts_PK)
    return weights_PK / weights_PK.sum(-1, keepdim=True) if normalizes else weights_PK


def _force(router: nn.Module, _: Any, answer: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """A forward hook; a function of the module, so that a copy of the model has its own state."""
    forced_PK: Tensor | None = getattr(router, FORCED)
    if forced_PK is None:
        return None
    logits_PE, weights_PK, own_PK = answer
    experts_PK = torch.where(forced_PK < 0, own_PK, forced_PK.to(own_PK.dtype))
    weights = _weights(logits_PE, experts_PK, cast(bool, getattr(router, NORMALIZES)))
    return logits_PE, weights.to(weights_PK.dtype), experts_PK


def _refused(model: PreTrainedModel, seen: str) -> ConfigError:
    return ConfigError(
        f"actor.router_replay is true and actor.path a {type(model).__name__} with {seen}: expected a mixture of "
        "experts whose routers take a softmax (docs/models.md); set actor.router_replay to false"
    )
