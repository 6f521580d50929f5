"""Token log-probabilities and entropy of one chunk of logits, and their gradient, in little more than its memory.

Owns the softmax over the vocabulary. Invariant: besides the logits only a few of their rows exist at once, forward
and backward; the gradient takes the logits' own memory, so a chunk goes backward once. Pure. Called by model.py and
head.py.

With x = logits / T, Z = logsumexp(x), p = exp(x - Z), H = -sum p log p:

    d logprob(j) / dx = onehot(j) - p        dH / dx = -p (log p + H)

Shapes: R rows, V vocabulary, U wanted (row, token) pairs, B rows of one block.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK_BYTES = 4 * 2**20  # stays in the cache between the passes over it
GPU_BLOCK_BYTES = 32 * 2**20  # enough work for a launch


def logprobs_of_logits(
    logits_RV: Tensor, row_U: Tensor, token_U: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the U pairs, and the entropy of every row. The backward pass eats `logits`.

    The entropy has a gradient only where it is asked for.
    """
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _TokenLogprobs.apply)
    return apply(logits_RV, row_U, token_U, temperature, entropy_gradient)


def _blocks(logits_RV: Tensor) -> Iterator[slice]:
    block_bytes = CPU_BLOCK_BYTES if logits_RV.device.type == "cpu" else GPU_BLOCK_BYTES
    num_rows = max(1, block_bytes // (4 * logits_RV.shape[1]))
    for start in range(0, logits_RV.shape[0], num_rows):
        yield slice(start, min(start + num_rows, logits_RV.shape[0]))


def evaluate(logits_RV: Tensor, row_U: Tensor, token_U: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities of the U pairs; entropy and Z of every row."""
    normalizer_R = logits_RV.new_empty(logits_RV.shape[0])
    entropy_R = torch.empty_like(normalizer_R)
    for rows in _blocks(logits_RV):
        scaled_BV = logits_RV[rows] / temperature
        normalizer_R[rows] = torch.logsumexp(scaled_BV, dim=-1)
        logprobs_BV = scaled_BV.sub_(normalizer_R[rows, None])
        entropy_R[rows] = -(logprobs_BV.exp() * logprobs_BV).sum(-1)
    return logits_RV[row_U, token_U] / temperature - normalizer_R[row_U], entropy_R, normalizer_R


def turn_into_gradient(
    logits_RV: Tensor,
    row_U: Tensor,
    token_U: Tensor,
    normalizer_R: Tensor,
    entropy_R: Tensor,
    grad_U: Tensor,
    grad_entropy_R: Tensor | None,
    temperature: float,
) -> Tensor:
    """The gradient of the logits, in their memory, from those of the log-probabilities and, if any, the entropies."""
    total_R = torch.zeros_like(normalizer_R).index_add_(0, row_U, grad_U)
    for rows in _blocks(logits_RV):
        logprobs_BV = logits_RV[rows].div_(temperature).sub_(normalizer_R[rows, None])
        if grad_entropy_R is None:
            logprobs_BV.exp_().mul_(total_R[rows, None] / -temperature)
        else:
            factor_BV = (logprobs_BV + entropy_R[rows, None]).mul_(grad_entropy_R[rows, None]).add_(total_R[rows, None])
            logprobs_BV.exp_().mul_(factor_BV).mul_(-1 / temperature)
    return logits_RV.index_put_((row_U, token_U), grad_U / temperature, accumulate=True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, row_U: Tensor, token_U: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs_U, entropy_R, normalizer_R = evaluate(logits_RV, row_U, token_U, temperature)
        ctx.save_for_backward(logits_RV, row_U, token_U, normalizer_R, entropy_R)
        ctx.temperature = temperature
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_R)
        return logprobs_U, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_U: Tensor, grad_entropy_R: Tensor) -> tuple[Tensor | None, ...]:
        grad_of_entropy = grad_entropy_R if ctx.entropy_gradient else None
        logits_RV, row_U, token_U, normalizer_R, entropy_R = ctx.saved_tensors
        gradient_RV = turn_into_gradient(
            logits_RV, row_U, token_U, normalizer_R, entropy_R, grad_U, grad_of_entropy, ctx.temperature
        )
        return gradient_RV, None, None, None, None
