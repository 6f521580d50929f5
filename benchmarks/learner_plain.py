"""The plain way to train on a batch, as a loop in the style of transformers' Trainer does it.

Owns the other side of the learner's benchmark. Each sequence with its own copy of the prompt, ordered by length,
right-padded micro-batches, full logits, log-softmax, gather, fused AdamW. Invariant: the same loss as Penstock's
default.

Shapes: B sequences of a micro-batch, T their padded length, V vocabulary.
"""

from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.learner_cases import GROUP_SIZE, REWARDS, Case

EPS_CLIP, ADVANTAGE_EPS = 0.2, 1e-6  # Penstock's defaults
MAX_GRAD_NORM = 1e9  # nothing is clipped, so that the gradients of both sides can be compared


@dataclass(frozen=True)
class Sequence:
    """One completion after its prompt; `index` is (index of the prompt, index of the completion)."""

    index: tuple[int, int]
    ids: tuple[int, ...]
    num_prompt: int
    advantage: float


def sequences_of(case: Case) -> list[Sequence]:
    mean, spread = fmean(REWARDS), stdev(REWARDS) + ADVANTAGE_EPS
    sequences = [
        Sequence((number, index), prompt + ids, len(prompt), (REWARDS[index] - mean) / spread)
        for number, prompt in enumerate(case.prompts)
        for index, ids in enumerate(case.completions[number])
    ]
    return sorted(sequences, key=lambda sequence: len(sequence.ids))


class PlainTrainer:
    """A model, its optimizer and the step."""

    def __init__(self, path: str, dtype: torch.dtype, lr: float, micro_batch: int, device: torch.device) -> None:
        disable_progress_bar()
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model.to(device)  # type: ignore[arg-type]
        self._device, self._dtype, self._micro_batch = device, dtype, micro_batch
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def _logprobs(self, part: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens but the first [B, T - 1], and which of them are completion tokens."""
        longest = max(len(each.ids) for each in part)
        ids_BT = torch.tensor([each.ids + (0,) * (longest - len(each.ids)) for each in part], device=self._device)
        length_B1 = torch.tensor([[len(each.ids)] for each in part], device=self._device)
        prompt_B1 = torch.tensor([[each.num_prompt] for each in part], device=self._device)
        position_T = torch.arange(longest, device=self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            attention_BT = (position_T < length_B1).long()
            logits_BTV = self.model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
        logprobs_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), dim=-1)
        is_loss_BT = (position_T >= prompt_B1) & (position_T < length_B1)
        return logprobs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0], is_loss_BT[:, 1:]

    def logprobs(self, case: Case) -> list[list[list[float]]]:
        """The log-probabilities of all completion tokens, shaped like the case's completions."""
        found: dict[tuple[int, int], list[float]] = {}
        for sequence in sequences_of(case):
            with torch.no_grad():
                logprobs_1T, is_loss_1T = self._logprobs([sequence])
            found[sequence.index] = logprobs_1T[is_loss_1T].tolist()
        return [[found[number, index] for index in range(GROUP_SIZE)] for number in range(len(case.prompts))]

    def update(self, case: Case, behaviour: list[list[list[float]]]) -> None:
        """One step on the full batch."""
        sequences = sequences_of(case)
        for start in range(0, len(sequences), self._micro_batch):
            part = sequences[start : start + self._micro_batch]
            logprobs_BT, is_loss_BT = self._logprobs(part)
            behaviour_BT = torch.zeros_like(logprobs_BT)
            flat = [value for each in part for value in behaviour[each.index[0]][each.index[1]]]
            behaviour_BT[is_loss_BT] = torch.tensor(flat, device=self._device)
            advantage_B1 = torch.tensor([[each.advantage] for each in part], device=self._device)
            ratio_BT = torch.exp(logprobs_BT - behaviour_BT)
            clipped_BT = ratio_BT.clamp(1 - EPS_CLIP, 1 + EPS_CLIP)
            loss_BT = -torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
            (torch.where(is_loss_BT, loss_BT, 0.0).sum() / len(sequences)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
