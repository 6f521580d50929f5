"""Samples completions from a small model in one batch, and the log-probability of each token.

Owns the sampler's copy of the weights. Shapes: B sequences, T tokens of the longest prompt, V tokens in the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.sorting.task import END, MAX_NEW_TOKENS


@dataclass(frozen=True)
class Sampled:
    """The token ids of a completion, its end included if it has one, and the log-probability of each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Sampler:
    """A model that samples at temperature 1, or greedily."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._model = model.eval()
        self._generator = torch.Generator().manual_seed(seed)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights by name; tied ones may be there once."""
        named = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                named[name].copy_(weight)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Sequence[int]], *, greedy: bool = False) -> list[Sampled]:
        """One completion of each prompt."""
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[END] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        ended_B = torch.zeros(len(prompts), dtype=torch.bool)
        ids: list[Tensor] = []
        logprobs: list[Tensor] = []
        cache = None
        while len(ids) < MAX_NEW_TOKENS and not ended_B.all():
            output = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logprobs_BV = output.logits[:, -1].float().log_softmax(-1)
            chosen_B = logprobs_BV.argmax(-1) if greedy else self._draw(logprobs_BV)
            ids.append(torch.where(ended_B, -1, chosen_B))
            logprobs.append(logprobs_BV.gather(1, chosen_B[:, None])[:, 0])
            ended_B = ended_B | (chosen_B == END)
            ids_BT, position_BT = chosen_B[:, None], position_BT[:, -1:] + 1
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
        return _completions(torch.stack(ids, 1), torch.stack(logprobs, 1))

    def _draw(self, logprobs_BV: Tensor) -> Tensor:
        return torch.multinomial(logprobs_BV.exp(), 1, generator=self._generator)[:, 0]


def _completions(ids_BN: Tensor, logprobs_BN: Tensor) -> list[Sampled]:
    """One for each row; -1 is no token."""
    rows = zip(ids_BN.tolist(), logprobs_BN.tolist(), strict=True)
    kept = ((ids, logprobs, sum(each >= 0 for each in ids)) for ids, logprobs in rows)
    return [Sampled(tuple(ids[:count]), tuple(logprobs[:count])) for ids, logprobs, count in kept]
