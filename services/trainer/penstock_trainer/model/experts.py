"""The experts of a mixture: how rows go through them, and which of them were used.

Owns a function registered with transformers' experts interface. It is the grouped product of transformers, with two
differences. The products are in the type of the pass: under autocast transformers would keep the master weights'
float32, which an engine does not compute with. And the gradient has one order of its sums: a row is repeated for each
of its experts before it is sorted, so that no two threads add to one row.

Shapes: P rows, K experts of a row, D hidden size, E experts of a layer, L layers with experts.
"""

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "penstock_grouped"
CHOSEN = "penstock_chosen_PK"  # attribute of a layer's experts: those of the rows of its last pass
LAYER = re.compile(r"\.layers\.(\d+)\.")


def use_grouped_experts(model: PreTrainedModel) -> None:
    """Make the model compute its experts by `grouped_experts`, if it has any behind transformers' interface."""
    if not model._can_set_experts_implementation():
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, cast(Any, grouped_experts))
    model.set_experts_implementation(NAME)


def grouped_experts(module: nn.Module, hidden_PD: Tensor, experts_PK: Tensor, weights_PK: Tensor) -> Tensor:
    """transformers' experts interface: sum_k weight_k expert_k(hidden) of each row, [P, D]."""
    setattr(module, CHOSEN, experts_PK)
    num_rows, top_k = experts_PK.shape
    pairs_D = hidden_PD[:, None].expand(-1, top_k, -1).reshape(num_rows * top_k, -1)
    each_D = grouped_mm_experts_forward(
        cast(nn.Module, _typed(module, pairs_D)), pairs_D, experts_PK.reshape(-1, 1), weights_PK.reshape(-1, 1)
    )
    return each_D.view(num_rows, top_k, -1).sum(1)


class ExpertUse:
    """Which experts the last pass of a model used, by layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = list(_experts(model))

    @property
    def is_known(self) -> bool:
        """Whether the model has experts behind the interface."""
        return bool(self._modules)

    def of_last_pass(self, rows: Tensor | None) -> tuple[tuple[int, ...], ...]:
        """[L][E]: how many rows each expert got. rows: the indices of those that count; None: all."""
        counts = []
        for module in self._modules:
            chosen_PK: Tensor = getattr(module, CHOSEN)
            chosen_PK = chosen_PK if rows is None else chosen_PK.index_select(0, rows)
            counts.append(torch.bincount(chosen_PK.flatten(), minlength=cast(int, module.num_experts)))
        return tuple(tuple(each) for each in torch.stack(counts).tolist())


def has_fused_experts(model: PreTrainedModel) -> bool:
    """Whether the model has experts behind the interface, whose weights are fused."""
    return any(True for _ in _experts(model))


def layer_of(name: str) -> int:
    """The number of the decoder layer that a module is in, by its name; -1: in none."""
    found = LAYER.search(f".{name}.")
    return int(found[1]) if found else -1


def _experts(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that compute by the interface."""
    if model.config.get_text_config()._experts_implementation != NAME:
        return
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts"):
            yield module


class _Typed:
    """A module's attributes, with weights in another type."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _typed(module: nn.Module, hidden: Tensor) -> nn.Module | _Typed:
    device = hidden.device.type
    return _Typed(module, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else module
