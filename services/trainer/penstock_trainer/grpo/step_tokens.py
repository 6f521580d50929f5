"""What all tokens of an optimizer step have in common: means, and bounds that leave a share of them.

Owns the columns that the step collects before it computes a gradient, over all packs and ranks. Invariant: nothing here
depends on the order of the tokens or on how packs and ranks share them, but for the rounding of sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from penstock_trainer.grpo.tokens import Tokens


@dataclass(frozen=True)
class StepTokens:
    """float[M] of the unmasked tokens of a step.

    log_w: l - l_b, clamped. weight: rho_hat, before it is normalized; 1 without a weight. is_first: 1 for the first of
    these tokens of a completion (of a path of an episode), else 0. entropy: 0 if no part needs it. draw: see `Tokens`;
    0 if no part needs it.
    """

    log_w: Tensor
    logprobs: Tensor
    advantage: Tensor
    weight: Tensor
    is_first: Tensor
    entropy: Tensor
    draw: Tensor

    @classmethod
    def of(cls, tokens: Tokens, log_w_N: Tensor, weight_N: Tensor, mask_N: Tensor) -> "StepTokens":
        """Those of one micro-batch."""
        zeros_N = torch.zeros_like(log_w_N)
        columns_N = (
            log_w_N,
            tokens.logprobs_N.detach(),
            tokens.advantage_N,
            weight_N,
            _is_first(tokens, mask_N).to(log_w_N.dtype),
            zeros_N if tokens.entropy_N is None else tokens.entropy_N.detach(),
            zeros_N if tokens.draw_N is None else tokens.draw_N,
        )
        return cls(*(each_N[mask_N] for each_N in columns_N))

    def columns(self) -> Tensor:
        """[7, M]."""
        return torch.stack([getattr(self, each.name) for each in fields(self)])

    @classmethod
    def of_columns(cls, parts: Sequence[Tensor]) -> "StepTokens":
        """Those of micro-batches, or ranks, together."""
        return cls(*torch.cat(list(parts), 1))

    def mean_weight(self, *, of_sequences: bool) -> float:
        """Over the tokens, or the completions, whose weight is not 0; 1 without any."""
        kept = self.weight[(self.weight > 0) & ((self.is_first > 0) | (not of_sequences))].double()
        return float(kept.mean()) if kept.numel() else 1.0


NO_COLUMNS = torch.zeros(len(fields(StepTokens)), 0)
"""Those of no micro-batch."""


def _is_first(tokens: Tokens, mask_N: Tensor) -> Tensor:
    numbers_N = torch.arange(mask_N.numel(), device=mask_N.device)
    first_S = torch.full((tokens.num_sequences,), mask_N.numel(), device=mask_N.device)
    first_S = first_S.scatter_reduce(0, tokens.sequence_N[mask_N], numbers_N[mask_N], "amin")
    return mask_N & (numbers_N == tokens.spread(first_S))
