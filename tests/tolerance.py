"""How far two right computations of the same log-probabilities may lie apart."""

import math
from typing import Any

import torch

UNIT_ROUNDOFF = 2.0**-24
"""Of float32: the largest relative error of one operation."""

CERTAINTY = 5.0
"""How many standard errors the bound allows: one value in two million exceeds it."""


def logprob_tolerance(model: Any, num_tokens: int) -> float:
    """What log-probabilities of a Llama in float32 may differ by, in nats, whatever the order of the sums.

    Each of `n` operations on the way to a value errs by at most `u` of it (UNIT_ROUNDOFF). Together that is at most
    `n u`, and no more than `CERTAINTY sqrt(n) u` but once in two million, since roundings err to both sides (Higham
    and Mary, A new approach to probabilistic rounding error analysis, 2019, theorem 2.4). `n` counts the longest way,
    one sum after the other: in each layer two norms and the projections of queries, of the output and of the gate (the
    width each), the scores (the size of a head), the mean over the sequence (`num_tokens`), and the projection down
    (the inner width); at the end a norm, the head (the width each) and the softmax (the vocabulary). The norm before
    each block passes a relative error on as it is.

    So much is the relative error of the logits. By Cauchy and Schwarz none is larger than the length of the normed
    state, sqrt(width) times the largest weight of the last norm, times that of its row in the head. The error of a
    log-probability is at most twice a logit's, its own and the normaliser's, and both computations err. At a
    temperature T logits, and so this, are 1 / T times as large.
    """
    config = model.config
    width = config.hidden_size
    layer = [width] * 5 + [width // config.num_attention_heads, num_tokens, config.intermediate_size]
    num_operations = sum(layer) * config.num_hidden_layers + 2 * width + config.vocab_size
    relative = CERTAINTY * UNIT_ROUNDOFF * math.sqrt(num_operations)
    with torch.no_grad():
        norm, head = model.model.norm.weight.float(), model.lm_head.weight.float()
        largest = math.sqrt(width) * float(norm.abs().max()) * float(head.norm(dim=-1).max())
    return 2 * 2 * relative * largest
