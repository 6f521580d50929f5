"""Aggregation: from a value per token to the loss of a batch, as one weight per completion.

Invariant: every count is of the full batch, over all ranks and micro-batches, taken before any token is rejected and
including completions that were left out of the forward pass because they have no gradient.
"""

from typing import Literal

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm"]


def sequence_weight(
    aggregation: Aggregation,
    *,
    num_groups: int,
    num_valid_in_group: int,
    num_tokens: int,
    num_tokens_in_batch: int,
    norm_length: int,
) -> float:
    """Weight of every token of a completion of `num_tokens` loss tokens; the loss is the weighted sum over all tokens.

    | Mode | Weight | Source |
    | --- | --- | --- |
    | seq-mean-token-sum | 1 / (groups * valid in group) | the source document's E[1/G sum_i sum_t ...] |
    | seq-mean-token-mean | that / tokens of the completion | DeepSeekMath's 1/G sum_i 1/abs(o_i) sum_t |
    | token-sum-norm | that of seq-mean-token-sum / norm_length | Dr. GRPO (arXiv 2503.20783): a constant length |
    | token-mean | 1 / tokens of the batch | DAPO (arXiv 2503.14476), equation 8 |
    """
    if aggregation == "token-mean":
        return 1.0 / num_tokens_in_batch
    weight = 1.0 / (num_groups * num_valid_in_group)
    if aggregation == "seq-mean-token-sum":
        return weight
    return weight / (num_tokens if aggregation == "seq-mean-token-mean" else norm_length)
