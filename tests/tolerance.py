"""How much two correct computations of the same log-probabilities may differ."""

import math
from typing import Any

import torch

UNIT_ROUNDOFF = 2.0**-24
"""Of float32: the largest relative error of one operation."""

CERTAINTY = 5.0
"""How many standard errors the bound allows: one value in two million exceeds it."""


def logprob_tolerance(model: Any, num_tokens: int) -> float:
    """The largest difference of a Llama's log-probabilities in float32, in nats, over any orders of summation.

    Each of `n` operations on the way to a value has a relative error of at most `u` (UNIT_ROUNDOFF). Together that is
    at most `n u`; and since errors have both signs, more than `CERTAINTY sqrt(n) u` only once in two million cases
    (Higham and Mary, A new approach to probabilistic rounding error analysis, 2019, theorem 2.4). `n` counts the sums
    on the longest path. In each layer: two norms and the projections of queries, output and gate (the width each), the
    scores (the size of a head), the mean over the sequence (`num_tokens`), and the projection down (the inner width).
    At the end: a norm and the head (the width each), and the softmax (the vocabulary). The norm before each block
    passes a relative error on unchanged.

    This bounds the relative error of the logits. By Cauchy-Schwarz, a logit is at most the length of the normed state
    (sqrt(width) times the largest weight of the last norm) times the length of its row in the head. The error of a
    log-probability is at most twice that of a logit: its own and the normaliser's. Both computations have this error.
    At temperature T, the logits and so the error are 1 / T times as large.
    """
    config = model.config
    width = config.hidden_size
    layer = [width] * 5 + [width // config.num_attention_heads, num_tokens, config.intermediate_size]
    num_operations = sum(layer) * config.num_hidden_layers + 2 * width + config.vocab_size
    relative = CERTAINTY * UNIT_ROUNDOFF * math.sqrt(num_operations)
    with torch.no_grad():
        norm, head = model.model.norm, model.lm_head.weight.float()
        weights = norm(torch.ones(width, dtype=norm.weight.dtype))  # some families store what they differ by from 1
        largest = math.sqrt(width) * float(weights.float().abs().max()) * float(head.norm(dim=-1).max())
    return 2 * 2 * relative * largest
