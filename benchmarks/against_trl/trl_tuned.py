"""TRL's GRPOTrainer with its inner loops written for few cores and short completions.

Owns what no setting of TRL 1.16 can change. Invariant: for the same completions, the update equals GRPOTrainer's up to
rounding. Only work that does not affect it is left out:
- generation and training compute each distinct prompt once (TRL: once per completion);
- generation drops finished rows from the batch;
- completions with advantage 0 enter neither forward nor backward pass;
- only positions that predict a completion's token are projected onto the vocabulary (TRL does so on GPUs only);
- the entropy, which TRL computes for its log, is not computed.
The prompts begin with the same tokens, but that prefix is not shared: transformers' cache cannot do it.
"""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer  # type: ignore[import-not-found]

ROW_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


class TunedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """All prompts of a batch have the same length, so nothing is padded on the left.

    B: completions of a batch, P: distinct prompts, T: tokens, N: scored tokens, D: width, V: vocabulary.
    """

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *_: Any
    ) -> tuple[list[list[int]], None]:
        with torch.no_grad():
            model = self.accelerator.unwrap_model(self.model)
            completions = generate(model, prompt_ids, self.max_completion_length, self.eos_token_ids, self.temperature)
        return completions, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        kept = inputs["advantages"].nonzero().flatten()
        if len(kept) == 0:
            kept = torch.zeros(1, dtype=torch.long)  # a loss of 0 that can be differentiated
        rows = {key: inputs[key][kept] for key in ROW_KEYS}
        result: Tensor = super()._compute_loss(model, {**inputs, **rows})
        return result

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        causal_lm = self.accelerator.unwrap_model(model)
        if not bool(attention_mask[:, :-logits_to_keep].all()):
            raise ValueError("prompts of different lengths in one batch; this trainer expects equal ones")
        targets_BT, mask_BT = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        # Padding is on the right only, where no scored position attends to it: plain causal attention is enough.
        prompts_PT, source_B = input_ids[:, :-logits_to_keep].unique(dim=0, return_inverse=True)
        prefill = causal_lm.model(input_ids=prompts_PT, use_cache=True)
        hidden_BTD = prefill.last_hidden_state[:, -1:].index_select(0, source_B)
        if logits_to_keep > 1:
            prefill.past_key_values.batch_select_indices(source_B)  # the gradient goes through the cache
            rest = causal_lm.model(input_ids=targets_BT[:, :-1], past_key_values=prefill.past_key_values)
            hidden_BTD = torch.cat([hidden_BTD, rest.last_hidden_state], dim=1)
        logits_NV = causal_lm.lm_head(hidden_BTD[mask_BT]) / self.temperature
        logprobs_N = -torch.nn.functional.cross_entropy(logits_NV, targets_BT[mask_BT], reduction="none")
        logprobs_BT = logprobs_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, logprobs_N)
        return logprobs_BT, torch.zeros_like(logprobs_BT), None


def generate(
    model: Any, prompts: list[list[int]], max_new_tokens: int, end_ids: list[int], temperature: float
) -> list[list[int]]:
    """One sampled completion per prompt, including its end token; equal prompts are computed once."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    if len({len(prompt) for prompt in distinct}) != 1:
        raise ValueError("prompts of different lengths in one batch; this generation expects equal ones")
    positions = {prompt: number for number, prompt in enumerate(distinct)}
    source_B = torch.tensor([positions[tuple(prompt)] for prompt in prompts])
    output = model(input_ids=torch.tensor(distinct), use_cache=True, logits_to_keep=1)
    cache, logits_BV = output.past_key_values, output.logits[:, -1][source_B]
    cache.batch_select_indices(source_B)
    completions: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))
    ends = torch.tensor(end_ids)
    for number in range(max_new_tokens):
        tokens_B = torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), 1)
        for row, token in zip(alive.tolist(), tokens_B.flatten().tolist(), strict=True):
            completions[row].append(token)
        unfinished = (~torch.isin(tokens_B.flatten(), ends)).nonzero().flatten()
        if number == max_new_tokens - 1 or len(unfinished) == 0:
            break
        if len(unfinished) < len(alive):
            cache.batch_select_indices(unfinished)
            alive, tokens_B = alive[unfinished], tokens_B[unfinished]
        logits_BV = model(input_ids=tokens_B, past_key_values=cache, use_cache=True).logits[:, -1]
    return completions
