"""A sampler that routes tokens otherwise than the trainer would, as rounding does in an engine."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.contracts import ScoredGroup, pack_float32, unpack_int32
from penstock.contracts.trajectories import RoutedExperts
from tests.unit.trainer.model.families import NUM_EXPERTS, TOP_K, family

NUM_LAYERS = 2


class NoisySampler:
    """An engine whose rounding flips routes: the same weights, with noise on the router's logits.

    Written against transformers' own pass; it shares nothing with the trainer.
    """

    def __init__(self, model: PreTrainedModel, noise: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.set_experts_implementation("eager")
        self.routes: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(11)
        for layer, block in enumerate(self.model.model.layers):
            if hasattr(block.mlp, "gate"):
                block.mlp.gate.register_forward_hook(self._router(layer, noise))

    def _router(self, layer: int, noise: float) -> Callable[..., Any]:
        def flip(router: nn.Module, args: tuple[Tensor, ...], answer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits, weights, _ = answer
            noisy = logits + noise * self.draw(layer)[: len(logits)]
            experts = noisy.topk(TOP_K, dim=-1).indices
            chosen = logits.float().softmax(-1).gather(-1, experts)  # without noise: only the choice differs
            if getattr(router, "norm_topk_prob", True):
                chosen = chosen / chosen.sum(-1, keepdim=True)
            self.routes[layer] = experts
            return logits, chosen.to(weights.dtype), experts

        return flip

    def draw(self, layer: int) -> Tensor:
        """[longest sequence, experts]."""
        return torch.randn(64, NUM_EXPERTS, generator=self._generator)

    def __call__(self, ids: Sequence[int]) -> tuple[Tensor, bytes]:
        """The log-probabilities of all tokens but the first; the experts of all rows but the last, as uint8."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        zeros = torch.zeros(len(ids), TOP_K, dtype=torch.int64)
        rows = torch.stack([self.routes.get(layer, zeros) for layer in range(NUM_LAYERS)], 1)
        own = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return own, rows[:-1].flatten(1).to(torch.uint8).numpy().tobytes()


def routed(data: bytes) -> RoutedExperts:
    return RoutedExperts(NUM_LAYERS * TOP_K, "uint8", data)


class _SameForAll(NoisySampler):
    """Its noise depends on layer and position alone, so that equal prompts have equal routes."""

    def draw(self, layer: int) -> Tensor:
        self._generator.manual_seed(layer)
        return super().draw(layer)


def routed_group(group: ScoredGroup, name: str = "qwen3_moe") -> ScoredGroup:
    """The group as a noisy sampler would have made it, which routes its prompt once for all completions."""
    sampler = _SameForAll(family(name), 1.0)
    prompt = unpack_int32(group.group.ticket.prompt_ids)
    width = NUM_LAYERS * TOP_K
    answers, rows = [], b""
    for each in group.group.completions:
        logprobs, rows = sampler([*prompt, *unpack_int32(each.token_ids)])
        own = pack_float32(logprobs[len(prompt) - 1 :].tolist())
        answers.append(msgspec.structs.replace(each, logprobs=own, experts=routed(rows[len(prompt) * width :])))
    whole = msgspec.structs.replace(
        group.group, completions=tuple(answers), prompt_experts=routed(rows[: len(prompt) * width])
    )
    return msgspec.structs.replace(group, group=whole)
